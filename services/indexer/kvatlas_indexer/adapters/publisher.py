"""Writes what this shard's engines hold to the shared store: records first, then blocks, a few milliseconds after.

What could not be written stays to be written; what the store turns out to have lost is published again from memory,
under new slot numbers. Between two engines' writes nothing is held up: they go out in the same rounds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import StoreUnavailable
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import Flush, Outcome, Position
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.handover import describe
from kvatlas_indexer.core.index import KvIndex
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.projection import Projection, Write
from kvatlas_indexer.core.records import encode_record

log = logging.getLogger(__name__)

EVERY_S = 0.002
"""Flushes begin no sooner after each other: what happens meanwhile is written together. The first waits for nothing."""
CHECK_S = 0.5  # how often idle engines are checked for what the store may have lost
RETRY_S = 0.2
NUMBERS_AT_ONCE = 256
NUMBERS_LOW = 128


class Publisher:
    """Of one shard. `lost(engine)` is called when the store refuses its writes: another shard owns it."""

    def __init__(self, index: KvIndex, store: RedisStore, *, clock: Callable[[], float]) -> None:
        self._index = index
        self._store = store
        self._clock = clock
        self._numbers: list[int] = []
        self._highest = 0
        self.projection = Projection(index.residency, partitions=store.partitions, new_number=self._new_number)
        self.lost: Callable[[EngineId], None] = lambda engine: None
        self.unwritten_since: float | None = None
        """Since when (`clock`) the store has taken nothing; None: it takes what it is given."""
        self.writes = Durations()
        """From something to be written to its being in the store, where every shard's lookups see it."""
        self.errors = 0
        self._touched_at: float | None = None
        self._fences: dict[EngineId, int] = {}
        self._told: dict[EngineId, bytes] = {}  # the record each engine has in the store
        self._described: dict[EngineId, tuple[object, ...]] = {}  # what that record was made from
        self._written: set[EngineId] = set()  # engines with a position in the store
        self._dead: list[int] = []
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._checked_at = clock()

    # -- what it is told -----------------------------------------------------------------------------------------------

    def own(self, engine: EngineId, fence: int) -> None:
        """From now on this shard writes it. One that the store has nothing of is published as a whole."""
        self._fences[engine] = fence
        self._told.pop(engine, None)
        self.touched()

    def resumed(self, engine: EngineId) -> None:
        """What the store has of it is right, as far as it goes."""
        self._written.add(engine)

    def disown(self, engine: EngineId) -> None:
        """Another shard writes it now."""
        self._fences.pop(engine, None)
        self._told.pop(engine, None)
        self._written.discard(engine)
        self.projection.forget(engine)
        self.projection.forget_retired(engine)

    def bury(self, numbers: Iterable[int]) -> None:
        """These slots hold nothing any more."""
        self._dead += numbers

    def touched(self) -> None:
        """Something may have changed."""
        if self._touched_at is None:
            self._touched_at = self._clock()
        self._wake.set()

    # -- its life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        flushed_at = float("-inf")
        while True:
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(max(0.0, flushed_at + EVERY_S - self._clock()))
            self._wake.clear()
            flushed_at = self._clock()
            touched_at, self._touched_at = self._touched_at, None
            try:
                await self.flush_all()
                if touched_at is not None:
                    self.writes.add(self._clock() - touched_at)
                await self._check()
            except StoreUnavailable as error:
                self._touched_at = touched_at
                self.errors += 1
                if self.unwritten_since is None:
                    self.unwritten_since = self._clock()
                    log.warning("the store takes no writes; they wait in memory", extra={"why": str(error)})
                await asyncio.sleep(RETRY_S)
                self.touched()

    def halted(self) -> asyncio.Lock:
        """While it is held, nothing is on its way to the store."""
        return self._flushing

    async def flush_all(self) -> None:
        """Writes everything that is to be written now. Raises `StoreUnavailable`: it stays to be written."""
        async with self._flushing:
            await self._stock_up()
            self._renumber()
            await self._put_records()
            await self._write(whole=True)
            await self._write(whole=False)
            await self._bury()
        if self.unwritten_since is not None:
            log.info("the store takes writes again", extra={"after_s": round(self._clock() - self.unwritten_since, 3)})
            self.unwritten_since = None

    def _renumber(self) -> None:
        """What is published as a whole gets new numbers, and its record has them before the blocks do. It begins a new
        epoch: a successor must not take what the partitions still say of the old numbers for the new ones.
        """
        for engine in self._fences.keys() - self._written:
            if engine in self.projection.waiting():
                self.projection.publish_again(engine)
        again = [e for e in self._fences if self.projection.is_whole(e) and self._position(e) is not None]
        self.projection.renumber(again)
        for engine in again:
            if (made := self._index.engine(engine)) is not None:
                made.begins_anew_elsewhere()

    async def _write(self, *, whole: bool) -> None:
        """Blocks, and how far their engines have come, taken between two messages. One whose record has fallen behind
        meanwhile waits for the next time: a successor would look for its blocks where they are not.
        """
        known = {known.id: known for known in self._index.known()}
        positions: dict[EngineId, Position] = {}
        for engine in self.projection.waiting():
            if self.projection.is_whole(engine) is whole and engine in self._fences and engine in known:
                position = self._position(engine)
                if position is not None and self._as_described(known[engine]):
                    positions[engine] = position
        if not positions:
            return
        projection = self.projection
        writes = projection.whole(positions) if whole else {engine: projection.take(engine) for engine in positions}
        flushes: list[Flush] = []
        for engine, parts in writes.items():
            by_partition = {write.partition: write for write in parts}
            for partition in range(self._store.partitions):
                write = by_partition.get(partition) or Write(engine, partition, ())
                flushes.append(Flush(write, self._fences[engine], positions[engine], whole))
        try:
            outcomes = await self._store.write_all(flushes)
        except BaseException:  # cancelled too: it may or may not have been written, and is not to be lost
            for engine, parts in writes.items():
                if whole:
                    self.projection.publish_again(engine)
                else:
                    self.projection.put_back(engine, parts)
            raise
        for flush, outcome in zip(flushes, outcomes, strict=True):
            self._judge(flush.write.engine, outcome)

    def _judge(self, engine: EngineId, outcome: Outcome) -> None:
        match outcome:
            case Outcome.OK:
                self._written.add(engine)
            case Outcome.BEHIND:
                if engine in self._fences and not self.projection.is_whole(engine):
                    log.warning("the store has lost what it was told; published again", extra={"engine": str(engine)})
                    self.projection.publish_again(engine)
                    self.touched()
            case Outcome.FENCED:
                if engine in self._fences:
                    self.lost(engine)

    # -- records -------------------------------------------------------------------------------------------------------

    async def _put_records(self) -> None:
        expected, residency = self._index.rules.expected, self._index.residency
        records: dict[str, tuple[int, bytes]] = {}
        signatures: dict[EngineId, tuple[object, ...]] = {}
        for known in self._index.known():
            engine = known.id
            if (fence := self._fences.get(engine)) is None or self._as_described(known):
                continue
            record = encode_record(describe(known, expected, self.projection, residency))
            signatures[engine] = self._signature(known)
            if self._told.get(engine) != record:
                records[str(engine)] = (fence, record)
        refused = await self._store.put_records(records) if records else frozenset()
        for name in refused:
            self.lost(EngineId.parse(name))
        for engine, signature in signatures.items():
            if engine in self._fences:
                self._told[engine] = records[str(engine)][1] if str(engine) in records else self._told[engine]
                self._described[engine] = signature
        known_now = {known.id for known in self._index.known()}
        for engine in [engine for engine in self._told if engine not in known_now]:
            if (fence := self._fences.get(engine)) is not None:
                await self._store.remove_record(engine, fence)
            del self._told[engine]
            self._described.pop(engine, None)

    def _as_described(self, known: Known) -> bool:
        """Whether its record would be what it was: to make one costs more than to see that nothing has changed."""
        return known.id in self._told and self._described.get(known.id) == self._signature(known)

    def _signature(self, known: Known) -> tuple[object, ...]:
        engine = known.engine
        view = self._index.fleet().engines.get(known.id)
        slots = (self._index.residency.version, self.projection.renumbered)
        return (view, slots, engine.epoch, len(engine.rules), engine.stream.standing())

    def _position(self, engine: EngineId) -> Position | None:
        made = self._index.engine(engine)
        last = made.stream.last_message if made else None
        return Position(made.epoch, *last) if made and last else None

    async def _check(self) -> None:
        """An idle engine is not written, so nobody would notice what the store has lost of it."""
        if self._clock() - self._checked_at < CHECK_S:
            return
        self._checked_at = self._clock()
        async with self._flushing:
            if self._told and not await self._store.version():
                self._told.clear()
                self.touched()
            idle = [(engine, fence) for engine, fence in self._fences.items() if engine in self._written]
            for engine, outcomes in (await self._store.positions(idle)).items():
                for outcome in outcomes:
                    if outcome is not Outcome.OK:
                        self._judge(engine, outcome)

    # -- slot numbers --------------------------------------------------------------------------------------------------

    def _new_number(self) -> int:
        return self._numbers.pop()

    async def _stock_up(self) -> None:
        """There are always enough numbers at hand for a flush: giving one out must not wait."""
        needed = NUMBERS_LOW + sum(len(self._index.residency.slots(known.id)) for known in self._index.known())
        while len(self._numbers) < needed:
            numbers = await self._store.allocate_slots(NUMBERS_AT_ONCE, above=self._highest)
            self._numbers += numbers
            self._highest = max(self._highest, numbers[-1])

    async def _bury(self) -> None:
        dead: Collection[int] = [*self._dead, *self.projection.take_retired()]
        if dead:
            self._dead = list(dead)
            await self._store.retire(dead)
            self._dead = []
