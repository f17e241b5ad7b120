"""An index, the engines that speak to it, and a clock: for tests of the index as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.index import Command, KvIndex, Rules
from tests.unit.indexer.core.published import SIZE, Publisher, profile

E1, E2 = EngineId("10.0.0.1:8000"), EngineId("10.0.0.2:8000")
PROMPT = list(range(5 * SIZE))
LATER = profile()
OLD = profile(Algorithm.SHA256_CBOR_64BIT, extra_keys=ExtraKeys.LORA_ID)


class World:
    """An index, the engines that speak to it, and a clock. Engines are dialled unless `peer` says who they are."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.findings: list[Finding] = []
        self.emptied: list[EngineId] = []
        self.index = KvIndex(
            rules,
            on_finding=lambda engine, finding: self.findings.append(finding),
            on_emptied=self.emptied.append,
        )
        self.now = 1000.0
        self._seq: dict[EngineId, int] = {}

    def say(
        self, engine: EngineId, *events: Any, seq: int | None = None, peer: str | None = None, rank: int | None = None
    ) -> list[Command]:
        number = self._seq.get(engine, 0) if seq is None else seq
        self._seq[engine] = number + 1
        self.now += 0.01
        payload = msgspec.msgpack.encode([self.now, list(events), rank])
        return self.frames(payload, engine=engine, seq=number, peer=peer)

    def frames(self, payload: bytes, *, engine: EngineId, seq: int, peer: str | None = None) -> list[Command]:
        frames = [f"kv@{engine.address}@m".encode(), seq.to_bytes(8, "big"), payload]
        dialled = engine if peer is None else None
        return self.index.on_frames(frames, self.now, peer=peer, dialled=dialled, port_rank=engine.rank)

    def store(self, engine: EngineId, used: HashProfile, tokens: Sequence[int] = PROMPT, **how: Any) -> list[Command]:
        seq, peer, rank = how.pop("seq", None), how.pop("peer", None), how.pop("rank", None)
        return self.say(engine, Publisher(used).stored(tokens, **how), seq=seq, peer=peer, rank=rank)

    def wants(self, *specs: EngineSpec) -> list[Command]:
        return self.index.on_specs(specs, self.now)

    def facts(self, engine: EngineId, health: Health = Health.READY, **what: Any) -> list[Command]:
        return self.index.on_facts(EngineFacts(engine, health, frozenset({"m"}), **what), self.now)

    def passes(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.index.on_tick(self.now)

    def matched(self, used: HashProfile = LATER, tokens: Sequence[int] = PROMPT, model: str = "m") -> dict[str, int]:
        keys = prompt_keys(used, [*tokens, 0]).tolist()
        return {str(m.engine): m.blocks for m in self.index.match(model, {used.name: keys}).matches}

    def unknown(self, *used: HashProfile) -> list[str]:
        return sorted(map(str, self.index.match("m", {p.name: [] for p in used}).unknown))

    def sync(self, engine: EngineId) -> Sync:
        return self.index.fleet().engines[engine].sync

    def codes(self) -> list[str]:
        return [finding.code for finding in self.findings]


def spec(engine: EngineId, *, replay: bool = False, dialled: bool = True, **more: Any) -> EngineSpec:
    return EngineSpec(
        engine.address,
        f"http://{engine.address}",
        events="tcp://e:5557" if dialled else None,
        replay="tcp://e:5600" if replay else None,
        **more,
    )


def two_engines() -> World:
    world = World()
    world.wants(spec(E1), spec(E2))
    for engine in (E1, E2):
        world.facts(engine)
    return world
