"""The vocabulary of findings: what can be wrong, how much it matters, and how long one finding holds.

| a finding is ... | so it is current                                                                                |
|------------------|-------------------------------------------------------------------------------------------------|
| a *state*        | as long as looking at the deployment shows it                                                   |
| *noted*          | until it has not happened again for a while: what was refused, what could not be read           |
| *passing*        | never: it happened, is logged, and leaves a state behind where something is wrong because of it |

A finding says what is wrong, the likely cause, and the exact change to make: a flag, a variable, a value. No finding
repeats a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Severity(IntEnum):
    """The worst first."""

    ERROR = 0  # requests fail, or find nothing in a cache that could serve them
    WARNING = 1  # it works, with less than it could have
    ADVICE = 2  # nothing is wrong now

    @property
    def word(self) -> str:
        return self.name.lower()


class Code(StrEnum):
    """What is wrong: a closed set, the label of metrics."""

    # engines
    ENGINE_DOWN = "engine-down"
    ENGINE_UNREADABLE = "engine-unreadable"
    NO_ENGINES = "no-engines"
    NOT_INDEXED = "engine-not-indexed"
    CACHING_OFF = "prefix-caching-off"
    RANKS_NOT_LISTED = "ranks-not-listed"
    SALTS_UNSEEN = "salts-unseen"
    # their events
    NO_EVENTS = "no-events"
    NOT_HEARD_YET = "not-heard-yet"
    EVENTS_UNREACHABLE = "events-unreachable"
    CANNOT_DIAL = "cannot-dial"
    REPLAY_ABSENT = "replay-absent"
    REPLAY_UNREACHABLE = "replay-unreachable"
    NAME_CLAIMED_TWICE = "name-claimed-twice"
    TOPIC_MODEL = "topic-model"
    INEXACT = "inexact"
    UNKNOWN_GROUP_KIND = "unknown-group-kind"
    MIXED_BLOCK_SIZES = "mixed-block-sizes"
    TOO_MANY_BLOCKS = "too-many-blocks"
    REFUSED_FRAMES = "refused-frames"
    REFUSED_MESSAGE = "refused-message"
    REFUSED_PAYLOAD = "refused-payload"
    TOO_MANY_ENGINES = "refused-too-many-engines"
    UNUSABLE_EVENT = "unusable-event"
    UNKNOWN_TYPE = "unknown-type"
    UNKNOWN_MEDIUM = "unknown-medium"
    MALFORMED = "malformed"
    LOSS = "loss"
    RESTART = "restart"
    # how they hash
    SEED_DIFFERS = "seed-differs"
    ALGORITHM_DIFFERS = "algorithm-differs"
    BLOCK_SIZE_DIFFERS = "block-size-differs"
    HASHES_NOT_REPRODUCIBLE = "hashes-not-reproducible"
    EXTRA_KEYS_NOT_REPRODUCIBLE = "extra-keys-not-reproducible"
    # what they report against what was predicted
    ZERO_HITS = "zero-hits"
    UNPREDICTED_HITS = "unpredicted-hits"
    ONE_BLOCK_SHORT = "one-block-short"
    CACHED_TOKENS_UNREPORTED = "cached-tokens-unreported"
    # the store
    STORE_EVICTS = "store-evicts"
    STORE_UNREACHABLE = "store-unreachable"
    # routers
    INDEXER_UNREACHABLE = "indexer-unreachable"
    FAILING_OPEN = "failing-open"
    TEMPLATE_DIFFERS = "template-differs"
    TOKENIZER_DIFFERS = "tokenizer-differs"
    TOKENIZER_MISSING = "tokenizer-missing"
    TOKENS_UNCHECKED = "tokens-unchecked"
    UNRENDERABLE = "unrenderable-requests"
    REANNOUNCING_ALLOWED = "reannouncing-allowed"

    @property
    def severity(self) -> Severity:
        if self in _ERRORS:
            return Severity.ERROR
        return Severity.ADVICE if self in _ADVICE else Severity.WARNING


_ERRORS = frozenset({
    Code.ENGINE_DOWN, Code.NO_ENGINES, Code.NOT_INDEXED, Code.CACHING_OFF, Code.NO_EVENTS, Code.EVENTS_UNREACHABLE,
    Code.CANNOT_DIAL, Code.NAME_CLAIMED_TWICE, Code.TOPIC_MODEL, Code.TOO_MANY_ENGINES, Code.ZERO_HITS,
    Code.STORE_UNREACHABLE, Code.INDEXER_UNREACHABLE, Code.FAILING_OPEN,
})  # fmt: skip
_ADVICE = frozenset({
    Code.NOT_HEARD_YET, Code.REPLAY_ABSENT, Code.SALTS_UNSEEN, Code.REANNOUNCING_ALLOWED, Code.TOKENS_UNCHECKED,
    Code.UNRENDERABLE, Code.RESTART,
})  # fmt: skip
NOTED = frozenset({
    Code.NAME_CLAIMED_TWICE, Code.TOPIC_MODEL, Code.CANNOT_DIAL, Code.REFUSED_FRAMES, Code.REFUSED_MESSAGE,
    Code.REFUSED_PAYLOAD, Code.TOO_MANY_ENGINES, Code.UNUSABLE_EVENT, Code.UNKNOWN_TYPE, Code.UNKNOWN_MEDIUM,
    Code.MALFORMED, Code.EXTRA_KEYS_NOT_REPRODUCIBLE,
})  # fmt: skip
"""Codes of what happens; it holds for a while."""
PASSING = frozenset({Code.LOSS, Code.RESTART})
"""Codes of what happens and is over. All others are of states."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, for an operator: `wrong` in a sentence, its likely `cause`, the `change` to make."""

    code: Code
    wrong: str
    cause: str = ""
    change: str = ""

    @property
    def severity(self) -> Severity:
        return self.code.severity

    @property
    def text(self) -> str:
        """All of it in one line."""
        cause = f"; likely {self.cause}" if self.cause else ""
        return f"{self.wrong}{cause}" + (f": {self.change}" if self.change else "")
