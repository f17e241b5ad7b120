"""One engine as its shard sees it: what it publishes, what is sent to it, and what it then reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.observations import Finished, Outcome, Routed
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.healing import Healing, HealingLimits
from kvatlas_indexer.core.index import Command, KvIndex, Rules
from kvatlas_indexer.core.naming import Expected
from tests.unit.indexer.core.published import SIZE, Publisher, profile

ENGINE = EngineId("10.0.0.1:8000")
USED = profile()
CONFIGURED = Expected(USED.algorithm, USED.seed, SIZE)
PROMPT = list(range(6 * SIZE))
LOSS_S = 100.0
"""Losses so far apart each put in doubt what is held."""


class Shard:
    """`joined`: the number of the first message it hears; above 0, the engine was warm, and is inexact for good."""

    def __init__(
        self,
        *,
        joined: int = 0,
        replay: bool = False,
        expected: Expected = CONFIGURED,
        limits: HealingLimits | None = None,
        **rules: Any,
    ) -> None:
        self.findings: list[str] = []
        self.index = KvIndex(Rules(expected, **rules), on_finding=lambda engine, finding: None)
        self.healing = Healing(self.index, on_finding=self._find, limits=limits)
        self.residency = self.index.residency
        self.now = 1000.0
        self.seq = joined
        self._requests = 0
        self.publisher = Publisher(USED)
        self.specify(replay="tcp://e:5600" if replay else None)
        self.index.on_facts(EngineFacts(ENGINE, Health.READY, frozenset({"m"})), self.now)

    def _find(self, engine: EngineId | None, finding: Finding) -> None:
        self.findings.append(finding.code)

    def specify(self, **more: Any) -> None:
        spec = EngineSpec(ENGINE.address, f"http://{ENGINE.address}", events="tcp://e:5557", **more)
        self.index.on_specs([spec], self.now)

    # -- what the engine publishes -------------------------------------------------------------------------------------

    def say(self, *events: Any) -> list[Command]:
        self.now += 0.01
        payload = msgspec.msgpack.encode([self.now, list(events)])
        frames = [b"kv@e@m", self.seq.to_bytes(8, "big"), payload]
        self.seq += 1
        return self.index.on_frames(frames, self.now, peer=None, dialled=ENGINE, port_rank=0)

    def store(self, blocks: int = 6, *, since: int = 0, tokens: Sequence[int] = PROMPT, **also: Any) -> None:
        """Blocks `since`..`blocks` of a prompt."""
        self.say(self.publisher.stored(tokens[: blocks * SIZE], since=since) | also)

    def remove(self, *blocks: int, tokens: Sequence[int] = PROMPT, **also: Any) -> None:
        keys = self.keys(tokens)
        for block in blocks:
            removed = {"type": "BlockRemoved", "block_hashes": [keys[block]], "medium": "GPU", "group_idx": 0}
            self.say(removed | also)

    def clear(self) -> None:
        self.say({"type": "AllBlocksCleared"})

    def lose(self) -> None:
        """A message is lost, and the next one shows it."""
        self.now += LOSS_S
        self.seq += 1
        self.say()

    # -- what routers tell ---------------------------------------------------------------------------------------------

    def route(
        self,
        tokens: Sequence[int] = PROMPT,
        *,
        request_id: str = "",
        predicted: int | None = None,
        profile: str = USED.name,
    ) -> str:
        """`predicted`: blocks; else as the index answers. Answers the request's id."""
        self._requests += 1
        name = request_id or f"r{self._requests}"
        blocks = self.matched(tokens) if predicted is None else predicted
        keys = {profile: tuple(self.keys(tokens)), "another/profile": (1, 2, 3)}
        routed = Routed(name, ENGINE, "m", len(tokens) + 1, blocks * SIZE, keys)
        assert not self.healing.observe(routed, self.now)
        return name

    def finish(self, name: str, hit: int | None, **also: Any) -> bool:
        """`hit`: blocks. Whether the index has changed."""
        said: dict[str, Any] = {"comparable": True, "outcome": Outcome.OK, "engine": ENGINE} | also
        tokens = None if hit is None else hit * SIZE
        return self.healing.observe(
            Finished(name, model="m", cached_tokens=tokens, completion_tokens=1, **said), self.now
        )

    def answer(self, hit: int, tokens: Sequence[int] = PROMPT) -> bool:
        """A request of its own, with nothing else going on."""
        self.now += 10.0
        return self.finish(self.route(tokens), hit)

    # -- what the index has --------------------------------------------------------------------------------------------

    @staticmethod
    def keys(tokens: Sequence[int] = PROMPT) -> list[int]:
        keys: list[int] = prompt_keys(USED, [*tokens, 0]).tolist()
        return keys

    def matched(self, tokens: Sequence[int] = PROMPT) -> int:
        found = self.index.match("m", {USED.name: self.keys(tokens)}).matches
        return found[0].blocks if found else 0

    def doubtful(self, tokens: Sequence[int] = PROMPT) -> int:
        found = self.index.match("m", {USED.name: self.keys(tokens)}).matches
        return found[0].doubtful if found else 0

    def copies(self, tokens: Sequence[int] = PROMPT, *, group: int = 0, medium: Medium = Medium.GPU) -> list[int]:
        """Of each block; doubtful ones negative."""
        held = [{(h.group, h.medium): h for h in self.residency.holders(key)} for key in self.keys(tokens)]
        found = [of.get((group, medium)) for of in held]
        return [0 if h is None else -h.copies if h.doubtful else h.copies for h in found]

    @property
    def sync(self) -> Sync:
        return self.index.fleet().engines[ENGINE].sync


def doubtful_shard(**how: Any) -> Shard:
    """Six blocks stored, then a loss."""
    shard = Shard(**how)
    shard.store()
    shard.lose()
    assert (shard.sync, shard.copies()) == (Sync.INEXACT, [-1] * 6)
    return shard


def warm_shard(**how: Any) -> Shard:
    """Joined late, with three blocks of the prompt known."""
    shard = Shard(joined=5, **how)
    shard.store(3)
    assert (shard.sync, shard.copies()) == (Sync.INEXACT, [1, 1, 1, 0, 0, 0])
    return shard
