"""This process as one shard of a shared index: takes engines, gives them up, and says so in Redis.

The rules are in `core.ownership`; here they are carried out. A message that is listened for comes in before its engine
is owned: it is parked, the engine is taken, and then it is applied like any other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.decode import decode_topic
from kvatlas_common.events.types import MalformedBatch
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.publisher import Publisher
from kvatlas_indexer.adapters.redis_client import StoreUnavailable
from kvatlas_indexer.adapters.redis_leases import Beat, RedisLeases
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.zmq_source import Origin
from kvatlas_indexer.core.handover import Holding, Reached, resume
from kvatlas_indexer.core.index import Command, KvIndex
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.ownership import Move, Ownership
from kvatlas_indexer.core.reading import Reading
from kvatlas_indexer.core.records import EngineRecord, decode_record

log = logging.getLogger(__name__)

BEAT_S = 0.5
PARKED_MAX = 4096
"""Messages kept per engine while it is being taken; beyond, the newest are dropped, and the gap is replayed."""
PARKED_ENGINES_MAX = 1024
RETURNED_S = 2.5 * BEAT_S
"""Back at a store that was wiped, stopped or out of reach, a shard keeps what it has and takes nothing new for so long:
who has not been heard again yet is not dead."""


@dataclass(frozen=True, slots=True)
class Hands:
    """What the shard has the indexer do."""

    own: Callable[[list[EngineSpec]], None]  # from now on dial, probe and index these
    apply: Callable[[Origin, Reading], None]  # a message that was parked
    perform: Callable[[Iterable[Command]], None]  # and whatever follows of messages that were applied


class Shard:
    """`recorded`: the addresses of all engines in the store. `wall`: seconds since the epoch; `clock` is monotonic."""

    def __init__(
        self,
        *,
        name: str,
        index: KvIndex,
        store: RedisStore,
        leases: RedisLeases,
        publisher: Publisher,
        hands: Hands,
        recorded: Callable[[], Set[str]],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.name = name
        self._index = index
        self._store = store
        self._leases = leases
        self._publisher = publisher
        self._hands = hands
        self._recorded = recorded
        self._clock = clock
        self._wall = wall
        self._ownership = Ownership(name)
        self._specs: dict[str, EngineSpec] = {}
        self._told_specs = False  # before that, every engine looks like one in no list
        self._fences: dict[str, int] = {}  # of the engines this shard holds, or is taking
        self._taken: set[str] = set()  # of those, the ones it has taken in whole
        self._parked: dict[str, deque[tuple[Origin, Reading]]] = {}
        self._hurry = asyncio.Event()
        self._asked: list[str] = []  # engines of the last heartbeat: of one cut short, the lease may be held unawares
        self._beaten = False
        self._away = False  # the last heartbeat failed; the store may carry it out all the same, later
        self._waits_until = float("-inf")

    # -- what the indexer tells it -------------------------------------------------------------------------------------

    def on_specs(self, specs: Iterable[EngineSpec]) -> None:
        self._specs, self._told_specs = {spec.address: spec for spec in specs}, True
        self._own()
        self._hurry.set()

    def admits(self, origin: Origin, reading: Reading) -> bool:
        """Whether a message is to be applied now; one that is not is parked until its engine has been taken."""
        if origin.dialled is not None:
            return origin.dialled.address in self._taken
        try:
            topic = decode_topic(reading.topic)
        except MalformedBatch:
            return True  # the index refuses it, and says why
        address = f"{topic.host}:{topic.port or self._index.rules.engine_port}"
        self._ownership.heard(address, self._clock())
        if address in self._taken:
            return True
        if address not in self._parked and len(self._parked) >= PARKED_ENGINES_MAX:
            return False
        parked = self._parked.setdefault(address, deque())
        if len(parked) < PARKED_MAX:
            parked.append((origin, reading))
        self._hurry.set()
        return False

    @property
    def away(self) -> bool:
        """Whether the store did not answer the last time."""
        return self._away

    # -- its life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled: one heartbeat after the other, early when there is news."""
        while True:
            try:
                await self._beat()
            except StoreUnavailable as error:
                self._away = True
                log.warning("shard cannot reach the store", extra={"why": str(error)})
            try:
                await asyncio.wait_for(self._hurry.wait(), BEAT_S)
            except TimeoutError:
                continue
            self._hurry.clear()
            await asyncio.sleep(BEAT_S / 20)  # so that much news at once is one heartbeat

    async def leave(self) -> None:
        """Hands everything over: written, then let go."""
        try:
            await self._publisher.flush_all()
            await self._leases.leave([*{*self._asked, *self._fences}])
        except StoreUnavailable as error:
            log.warning("engines could not be handed over", extra={"why": str(error)})

    async def _beat(self) -> None:
        now = self._clock()
        heard = [address for address in self._parked if self._ownership.hears(address, now)]
        unlisted = self._recorded() - self._specs.keys() if self._told_specs else frozenset()
        self._asked = list(dict.fromkeys([*self._specs, *self._fences, *heard, *unlisted]))
        beat = await self._leases.beat(self._asked, self._fences)
        if (beat.returned or self._away) and self._beaten:
            self._waits_until = self._clock() + RETURNED_S
        self._beaten, self._away = True, False
        await self._keep(beat)
        if now < self._waits_until:
            return
        wanted = {address: spec.events is not None for address, spec in self._specs.items()}
        orphans = self._ownership.orphaned(unlisted - beat.leases.keys(), now)
        wanted |= dict.fromkeys(orphans | (unlisted & self._fences.keys()), False)
        moves = self._ownership.moves(wanted=wanted, leases=beat.leases, live=beat.live, now=now)
        for address in [a for a, move in moves.items() if move is Move.RELEASE and a in self._taken]:
            await self._give_up(address)
        taking = {address: move is Move.FORCE for address, move in moves.items() if move is not Move.RELEASE}
        if taking:
            await self._take({address: force for address, force in taking.items() if address not in self._taken})

    async def _keep(self, beat: Beat) -> None:
        """Leases that ran out are taken again; those another shard has taken are lost."""
        ran_out: list[str] = []
        for address, fence in list(self._fences.items()):
            lease = beat.leases.get(address)
            if lease is None or (lease.shard == self.name and lease.fence != fence):  # got unawares, by a late answer
                ran_out.append(address)
            elif lease.shard != self.name:
                self._lose(address)
        if ran_out:
            # From the moment a lease is taken again, what is written under the last one's fence would be refused.
            async with self._publisher.halted():
                for address in ran_out:
                    await self._take_again(address)

    async def _take_again(self, address: str) -> None:
        if (fence := self._fences.get(address)) is None:
            return  # lost meanwhile
        again = await self._leases.acquire(address, force=False, above=fence)
        if again is None:
            self._lose(address)
            return
        self._fences[address] = again
        engines = self._engines(address)
        for engine in engines:
            self._publisher.own(engine, again)
        for engine in engines:
            if await self._store.raise_fence(engine, again) is None:
                await self._abandon(address)
                return

    def _lose(self, address: str) -> None:
        log.info("engine taken over by another shard", extra={"engine": address})
        self._let_go(address)

    # -- taking and giving up ------------------------------------------------------------------------------------------

    async def _take(self, addresses: Mapping[str, bool]) -> None:
        fences: dict[str, int] = {}
        for address, force in addresses.items():
            fence = await self._leases.acquire(address, force=force, above=self._fences.get(address, 0))
            if fence is not None:
                fences[address] = fence
        if not fences:
            return
        self._fences |= fences
        try:
            await self._take_in(fences)
        except StoreUnavailable:
            for address in fences:
                self._fences.pop(address, None)  # the lease runs out, or is taken again
            raise

    async def _take_in(self, fences: Mapping[str, int]) -> None:
        """Reads back what is known of these engines, and goes on where their last owners stood."""
        records = self._left_behind(await self._store.records(), fences)
        reached: dict[EngineId, list[Reached | None]] = {}
        refused: set[str] = set()
        for engine in {*records, *(e for address in fences for e in self._named(address))}:
            positions = await self._store.raise_fence(engine, fences[engine.address])
            if positions is None:
                refused.add(engine.address)
            else:
                reached[engine] = [Reached(p.epoch, p.seq, p.ts, p.digest) if p else None for p in positions]
        for address in refused:
            await self._abandon(address)
        fences = {address: fence for address, fence in fences.items() if address not in refused}
        reached = {engine: at for engine, at in reached.items() if engine.address in fences}
        records = {engine: record for engine, record in records.items() if engine in reached}
        for engine in await self._unwanted(records, fences):
            del records[engine], reached[engine]
        holdings = await self._read_back(records.values())
        now = self._wall()
        for engine, record in records.items():
            self._adopt(engine, record, reached[engine], holdings, now)
        self._taken |= fences.keys()
        for engine in reached:
            self._publisher.own(engine, fences[engine.address])
        self._own()
        for engine in records:
            if (known := self._index.engine(engine)) is not None:
                self._hands.perform(self._index.on_taken(known.id, self._wall()))
        for address in fences:
            for origin, reading in self._parked.pop(address, ()):
                self._hands.apply(origin, reading)
        self._hands.perform(())
        log.info("engines taken", extra={"engines": sorted(fences)})

    async def _unwanted(self, records: Mapping[EngineId, EngineRecord], fences: Mapping[str, int]) -> list[EngineId]:
        """Engines that were dialled, and were taken off every list while they had no owner: nobody's any more."""
        listed, now = self._specs.keys(), self._clock()
        gone = [engine for engine, record in records.items() if engine.address not in listed and not record.listened]
        gone = [engine for engine in gone if not self._ownership.hears(engine.address, now)]
        for engine in gone:
            if await self._store.remove_record(engine, fences[engine.address]):
                self._publisher.bury(records[engine].slot_numbers())
        return gone

    async def _read_back(self, records: Iterable[EngineRecord]) -> dict[int, list[Holding]]:
        """What these engines hold, by slot number."""
        numbers = {number for record in records for number in record.slot_numbers()}
        holdings: dict[int, list[Holding]] = {}
        if numbers:
            async for batch in self._store.scan(numbers):
                for key, number, copies in batch:
                    holdings.setdefault(number, []).append((key, number, copies))
        return holdings

    def _left_behind(
        self, found: tuple[int, dict[str, bytes]], fences: Mapping[str, int]
    ) -> dict[EngineId, EngineRecord]:
        records: dict[EngineId, EngineRecord] = {}
        for name, data in found[1].items():
            try:
                engine = EngineId.parse(name)
                if engine.address in fences:
                    records[engine] = decode_record(data)
            except ValueError as error:
                log.warning("a record in the store is passed over", extra={"engine": name, "why": str(error)})
        return records

    def _adopt(
        self,
        engine: EngineId,
        record: EngineRecord,
        reached: list[Reached | None],
        holdings: Mapping[int, list[Holding]],
        now: float,
    ) -> None:
        held = [holding for number in record.slot_numbers() for holding in holdings.get(number, ())]
        resumed = False

        def set_up(known: Known) -> None:
            nonlocal resumed
            resumed = resume(known, record, reached, held, self._index.residency)

        self._index.adopt(engine, set_up, now)
        if resumed:
            self._publisher.resumed(engine)
        else:
            self._publisher.bury(record.slot_numbers())

    async def _give_up(self, address: str) -> None:
        """Another shard is to own it: everything is written, then the lease let go."""
        self._taken.discard(address)
        await self._publisher.flush_all()
        await self._abandon(address)

    async def _abandon(self, address: str) -> None:
        fence = self._fences.get(address)
        self._let_go(address)
        if fence is not None:
            await self._leases.release(address, fence)

    def _let_go(self, address: str) -> None:
        engines = self._engines(address)
        self._fences.pop(address, None)
        self._taken.discard(address)
        self._hands.perform(self._index.abandon(address))
        for engine in engines:
            self._publisher.disown(engine)
            self._store.forget(engine)
        self._own()

    def lost(self, engine: EngineId) -> None:
        """A write was refused: another shard owns it by now."""
        self._lose(engine.address)
        self._hurry.set()

    def _own(self) -> None:
        self._hands.own([spec for address, spec in self._specs.items() if address in self._taken])

    def _engines(self, address: str) -> list[EngineId]:
        return [known.id for known in self._index.known() if known.id.address == address]

    def _named(self, address: str) -> tuple[EngineId, ...]:
        spec = self._specs.get(address)
        return spec.ids if spec else (EngineId(address),)
