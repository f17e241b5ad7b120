"""What of the residency in memory must still be written to the shared store, per engine and partition.

The journal only remembers *which* blocks of which slot were touched. What is written is their state at the time of
writing, absolute ("slot S holds c copies of key K"): it may be written twice or late, and what changed back in between
costs nothing. Between two messages of an engine the residency stands exactly at its last sequence number, so a `Write`
taken then carries that number.

Bounded: an engine with more than `pending_max` touched blocks (the store is away) forgets them and is published again
as a whole, from memory, when the store is back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvatlas_common.words import EngineId
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.slots import Slot

RECORD = struct.Struct(">IB")
"""One holder of a block in the shared store: slot number, copies."""
COPIES_MAX = 255


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """New copies of blocks in one slot: `copies[i]` of `keys[i]`, 0: no longer held."""

    number: int
    keys: Sequence[int]
    copies: bytes


@dataclass(frozen=True, slots=True)
class Write:
    """What one partition is told of one engine, in one go."""

    engine: EngineId
    partition: int
    slots: tuple[SlotWrite, ...]

    def __len__(self) -> int:
        return sum(len(write.keys) for write in self.slots)


@dataclass(slots=True)
class _Pending:
    touched: dict[Slot, dict[int, None]] = field(default_factory=dict)  # in order: what is in a row is read at once
    count: int = 0  # an upper bound: a key touched twice counts twice
    whole: bool = False  # everything is to be published again


class Projection:
    """The journal of a `Residency`. `new_number` gives out numbers never used before in the shared store."""

    def __init__(
        self,
        residency: Residency,
        *,
        partitions: int,
        new_number: Callable[[], int],
        pending_max: int = 1_000_000,
    ) -> None:
        self._residency = residency
        self._partitions = partitions
        self._new_number = new_number
        self._pending_max = pending_max
        self.renumbered = 0
        """Rises when slots get other numbers: records that name them are then stale."""
        self._pending: dict[EngineId, _Pending] = {}
        self._retired: list[tuple[EngineId, int]] = []
        residency.journal = self

    def touch(self, slot: Slot, keys: Iterable[int]) -> None:
        """The residency has changed these blocks of a slot."""
        pending = self._pending.get(slot.engine)
        if pending is None:
            pending = self._pending[slot.engine] = _Pending()
        if pending.whole:
            return
        touched = pending.touched.get(slot)
        if touched is None:
            touched = pending.touched[slot] = {}
        before = len(touched)
        touched.update(dict.fromkeys(keys))
        pending.count += len(touched) - before
        if pending.count > self._pending_max:
            self.publish_again(slot.engine)

    def retired(self, slot: Slot) -> None:
        """Its number is dead: the store's sweep is to be told."""
        if slot.number is not None:
            self._retired.append((slot.engine, slot.number))

    def take_retired(self) -> list[int]:
        retired, self._retired = self._retired, []
        return [number for _, number in retired]

    def forget_retired(self, engine: EngineId) -> None:
        """Its slots live on in other hands."""
        self._retired = [(owner, number) for owner, number in self._retired if owner != engine]

    def number(self, slot: Slot) -> int:
        """Its name in the shared store, given when first asked for."""
        if slot.number is None:
            slot.number = self._new_number()
        return slot.number

    def publish_again(self, engine: EngineId) -> None:
        """The store has lost what it was told of this engine, or was told too little."""
        self._pending[engine] = _Pending(whole=True)

    def forget(self, engine: EngineId) -> None:
        self._pending.pop(engine, None)

    def waiting(self) -> list[EngineId]:
        """Engines with something to write."""
        return list(self._pending)

    def is_whole(self, engine: EngineId) -> bool:
        """Whether all of the engine is to be published: by `whole`, not `take`."""
        pending = self._pending.get(engine)
        return pending is not None and pending.whole

    def take(self, engine: EngineId) -> list[Write]:
        """What is to be written now; it is pending no longer. Give back with `put_back` what could not be written."""
        pending = self._pending.pop(engine, None)
        if pending is None:
            return []
        by_partition: dict[int, list[SlotWrite]] = {}
        for slot, keys in pending.touched.items():
            if self._residency.is_live(slot):
                for partition, write in self._writes(slot, list(keys)):
                    by_partition.setdefault(partition, []).append(write)
        return [Write(engine, partition, tuple(writes)) for partition, writes in by_partition.items()]

    def put_back(self, engine: EngineId, writes: Iterable[Write]) -> None:
        numbers = {self.number(slot): slot for slot in self._residency.slots(engine)}
        for write in writes:
            for slot_write in write.slots:
                if (slot := numbers.get(slot_write.number)) is not None:
                    self.touch(slot, slot_write.keys)

    def renumber(self, engines: Iterable[EngineId]) -> None:
        """Before these are published as a whole: what the store may still hold under their old numbers is dead."""
        for slot in [slot for engine in engines for slot in self._residency.slots(engine)]:
            if slot.number is not None:
                self.retired(slot)
                slot.number = None
                self.renumbered += 1

    def whole(self, engines: Iterable[EngineId]) -> dict[EngineId, list[Write]]:
        """Everything these engines hold, in one walk over the index; nothing of them is pending any longer."""
        held: dict[EngineId, list[Write]] = {}
        wanted = {engine: self._residency.slots(engine) for engine in engines}
        keys_of = self._residency.keys_of([slot for slots in wanted.values() for slot in slots])
        for engine, slots in wanted.items():
            self._pending.pop(engine, None)
            by_partition: dict[int, list[SlotWrite]] = {}
            for slot in slots:
                for partition, write in self._writes(slot, keys_of[slot]):
                    by_partition.setdefault(partition, []).append(write)
            held[engine] = [Write(engine, partition, tuple(writes)) for partition, writes in by_partition.items()]
        return held

    def _writes(self, slot: Slot, keys: list[int]) -> list[tuple[int, SlotWrite]]:
        """By partition."""
        if not keys:
            return []
        copies, number = [min(count, COPIES_MAX) for count in self._residency.copies(slot, keys)], self.number(slot)
        if self._partitions == 1:
            return [(0, SlotWrite(number, keys, bytes(copies)))]
        parts: dict[int, tuple[list[int], bytearray]] = {}
        for key, count in zip(keys, copies, strict=True):
            part = parts.setdefault(key % self._partitions, ([], bytearray()))
            part[0].append(key)
            part[1].append(count)
        return [(partition, SlotWrite(number, some, bytes(counts))) for partition, (some, counts) in parts.items()]
