"""A shared store as a dictionary, and an owner that writes to it as the publisher does, partition by partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.commands import Command, Replay
from kvatlas_indexer.core.effects import ReplayEnd
from kvatlas_indexer.core.expected import Expected
from kvatlas_indexer.core.handover import Holding, Reached, describe, resume
from kvatlas_indexer.core.index import KvIndex, Rules
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.projection import Projection
from kvatlas_indexer.core.records import EngineRecord, decode_record, encode_record
from tests.unit.indexer.core.published import SIZE, profile

ENGINE = EngineId("10.0.0.1:8000")
Table = dict[tuple[int, Medium, int], int]


@dataclass
class Store:
    """`blocks`: (slot number, key) -> copies. `reached`: where each partition stands."""

    partitions: int
    numbers: Iterator[int]
    record: bytes = b""
    blocks: dict[tuple[int, int], int] = field(default_factory=dict)
    reached: list[Reached | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reached = [None] * self.partitions

    def holdings(self) -> list[Holding]:
        return [(key, number, copies) for (number, key), copies in self.blocks.items()]


class Owner:
    """One shard that owns `ENGINE`, which can be asked for a replay if `replay`."""

    def __init__(self, store: Store, *, replay: bool = True, seed: str = "42") -> None:
        self.store = store
        used = profile()
        self.index = KvIndex(Rules(Expected(used.algorithm, seed, SIZE)), on_finding=lambda engine, finding: None)
        self.projection = Projection(
            self.index.residency, partitions=store.partitions, new_number=store.numbers.__next__
        )
        self.spec = EngineSpec(
            ENGINE.address, "http://e", events="tcp://e:5557", replay="tcp://e:5600" if replay else None
        )

    def begin(self, log: Sequence[list[bytes]], now: float) -> None:
        """Nothing is known of the engine yet."""
        self._replay(self.index.on_specs([self.spec], now), log, now)
        self.index.on_facts(EngineFacts(ENGINE, Health.READY, frozenset({"m"})), now)

    def take_over(self, log: Sequence[list[bytes]], now: float) -> bool:
        """From what is in the store; what was published since is asked of the engine. Whether it could go on."""
        resumed = False

        def set_up(known: Known) -> None:
            nonlocal resumed
            store = self.store
            resumed = resume(known, decode_record(store.record), store.reached, store.holdings(), self.index.residency)

        self.index.adopt(ENGINE, set_up, now)
        self._replay(self.index.on_specs([self.spec], now), log, now)
        self._replay(self.index.on_taken(ENGINE, now), log, now)
        return resumed

    def hear(self, frames: list[bytes], log: Sequence[list[bytes]], now: float) -> None:
        self._replay(self.index.on_frames(frames, now, peer=None, dialled=ENGINE, port_rank=0), log, now)

    def _replay(self, commands: Sequence[Command], log: Sequence[list[bytes]], now: float) -> None:
        for command in commands:
            if isinstance(command, Replay):
                for _, seq, payload in log[command.first_seq :]:
                    self.index.on_replayed(ENGINE, int.from_bytes(seq, "big"), payload, now)
                self._replay(self.index.on_replay_end(ENGINE, ReplayEnd.COMPLETE, now), log, now)

    def flush(self, *partitions: int) -> None:
        """The record, then the blocks; only these partitions answer, the others are to be written again."""
        self.store.record = encode_record(self.record())
        writes = self.projection.take(ENGINE)
        for partition in partitions:
            for write in writes:
                for slot in write.slots if write.partition == partition else ():
                    for key, copies in zip(slot.keys, slot.copies, strict=True):
                        self.store.blocks[slot.number, key] = copies
                        if not copies:
                            del self.store.blocks[slot.number, key]
            last = self.known.engine.stream.last_message
            self.store.reached[partition] = Reached(self.known.engine.epoch, *last) if last else None
        self.projection.put_back(ENGINE, [write for write in writes if write.partition not in partitions])

    def record(self) -> EngineRecord:
        return describe(self.known, self.index.rules.expected, self.projection, self.index.residency)

    @property
    def known(self) -> Known:
        (known,) = self.index.known()
        return known

    @property
    def view(self) -> EngineView:
        return self.index.fleet().engines[ENGINE]

    def table(self) -> Table:
        return self.index.residency.table(ENGINE)


def message(seq: int, now: float, *events: Any) -> list[bytes]:
    return [b"kv@e@m", seq.to_bytes(8, "big"), msgspec.msgpack.encode([now, list(events)])]
