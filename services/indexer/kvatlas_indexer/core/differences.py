"""Why an engine's cached tokens were not those predicted, and when that is worth an operator's attention.

Of an exact engine nothing is healed: its events are the truth, and a difference has another cause, the first that fits:

| cause         | fits where ...                                                                                  |
|---------------|-------------------------------------------------------------------------------------------------|
| `reset`       | its cache was cleared or began anew before the answer (a reset is published a step late)        |
| `inexact`     | the engine was not exact: what the index held of it may have been wrong                         |
| `race`        | the index knew otherwise as soon as the request was routed, or other requests ran on the engine |
|               | meanwhile or just before: their events were under way                                           |
| `speculative` | a block less was hit, as with speculative decoding that is not configured; or more, where it is |
|               | configured and seems not to be in use                                                           |
| `connector`   | more was hit, and the engine has other tiers: hits of KV connectors count as cached tokens      |
| `unexplained` | none of these                                                                                   |

One difference says little. The same one again and again, with nothing else between, is a *finding*: wrong settings make
no errors, only silent misses.
Source: vLLM 0.32 `v1/core/sched/scheduler.py` (what counts as cached tokens).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from kvatlas_common.findings import Code, Finding
from kvatlas_common.words import EngineId

REPEATED = 8
"""So many requests in a row that differ in the same way are no accident."""
ENGINES_MAX = 4096


class Cause(StrEnum):
    RACE = "race"
    RESET = "reset"
    CONNECTOR = "connector"
    SPECULATIVE = "speculative"
    UNEXPLAINED = "unexplained"
    INEXACT = "inexact"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request's cached tokens: as predicted, as the index knew when it was routed, and as the engine reported."""

    engine: EngineId
    predicted: int
    known: int
    actual: int
    block_size: int
    exact: bool  # the engine was, from the routing to the end
    reset: bool  # its cache was cleared or began anew meanwhile
    neighbours: bool  # other requests ran on it meanwhile, or just before
    tiered: bool  # it has other media than the gpu
    dropped: int  # blocks that speculative decoding is configured to compute again

    @property
    def short(self) -> int:
        """Blocks predicted and not hit; negative where more was hit."""
        return self.predicted // self.block_size - self.actual // self.block_size


def cause_of(compared: Comparison) -> Cause | None:
    """None where the prediction was right."""
    if compared.actual == compared.predicted:
        return None
    if compared.reset:
        return Cause.RESET
    if not compared.exact:
        return Cause.INEXACT
    if compared.known != compared.predicted or compared.neighbours:
        return Cause.RACE
    if _looks_speculative(compared):
        return Cause.SPECULATIVE
    return Cause.CONNECTOR if compared.actual > compared.predicted and compared.tiered else Cause.UNEXPLAINED


def _looks_speculative(compared: Comparison) -> bool:
    if compared.dropped:
        return 0 < -compared.short <= compared.dropped
    return compared.short == 1


class Repetitions:
    """Counts, per engine, how often in a row requests differ in the same way."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[EngineId, Finding], int] = OrderedDict()

    def add(self, compared: Comparison) -> Finding | None:
        """What the operator should know by now; told with every further repetition, so limit its rate."""
        if compared.reset:
            return None
        if compared.predicted and self._again(compared, _ZERO_HITS, not compared.actual):
            return _ZERO_HITS
        if not compared.exact:
            return None
        nothing_known = not compared.predicted and not compared.known
        if compared.actual and self._again(compared, _UNPREDICTED_HITS, nothing_known):
            return _UNPREDICTED_HITS
        one_less = _OTHER_DROP if compared.dropped else _ONE_SHORT
        if compared.predicted and self._again(compared, one_less, _looks_speculative(compared)):
            return one_less
        return None

    def current(self) -> list[tuple[EngineId, Finding]]:
        """What was repeated often enough, and nothing else has come between since."""
        return [at for at, count in self._counts.items() if count >= REPEATED]

    def _again(self, compared: Comparison, finding: Finding, differs: bool) -> bool:
        at = (compared.engine, finding)
        count = self._counts.pop(at, 0) + 1 if differs else 0
        if not count:
            self._counts.pop(at, None)
            return False
        self._counts[at] = count
        if len(self._counts) > ENGINES_MAX:
            self._counts.popitem(last=False)
        return count >= REPEATED


_ZERO_HITS = Finding(
    Code.ZERO_HITS,
    f"{REPEATED} requests in a row were predicted to hit its cache, and none did",
    "its address is a load balancer in front of several engines, or another engine publishes KV events under its name, "
    "or its prefix caching is off or its cache reset all the time, or requests wait so long that their blocks are "
    "evicted before they run",
    "name every engine by its own address; check the topic, --engine-port and the data-parallel rank; start it without "
    "--no-enable-prefix-caching",
)
_UNPREDICTED_HITS = Finding(
    Code.UNPREDICTED_HITS,
    f"{REPEATED} requests in a row hit its cache where nothing was predicted",
    "the router renders or tokenises prompts otherwise than the engine (chat template, tokenizer files, adapter), so "
    "that block keys differ; or its events are cut on the way; or a KV connector serves blocks that no event announces",
    "give the router the files the engine serves (--model-files NAME=PATH); check that the engine's events arrive",
)
_ONE_SHORT = Finding(
    Code.ONE_BLOCK_SHORT,
    f"{REPEATED} requests in a row hit one block less than predicted",
    "it decodes speculatively (EAGLE, MTP) and computes the last matched block again",
    "set speculative_drop_blocks to 1 for it: --engine <host:port>,speculative-drop-blocks=1",
)
_OTHER_DROP = Finding(
    Code.ONE_BLOCK_SHORT,
    f"{REPEATED} requests in a row hit more than predicted, by no more than the blocks that speculative decoding is "
    "said to drop",
    "it does not decode speculatively, or drops fewer blocks",
    "check speculative_drop_blocks for it: --engine <host:port>,speculative-drop-blocks=0",
)
