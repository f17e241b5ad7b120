"""The index in Redis or Valkey: reading for anybody, writing for owners. ADR 5 has the design and the key names.

Nothing here is remembered but how far this shard's own writes have come (`redis_writes`): any shard reads what any
other has written.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvatlas_common.matching import PromptKeys
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_blocks import Holders, all_blocks, block_keys, mget_command
from kvatlas_indexer.adapters.redis_client import RedisClient, Request
from kvatlas_indexer.adapters.redis_packing import Keys, key_array
from kvatlas_indexer.adapters.redis_scripts import Script
from kvatlas_indexer.adapters.redis_writes import Flush, Outcome, Position, RedisWrites
from kvatlas_indexer.core.projection import Write

WINDOW_FIRST = 512
WINDOW_MAX = 8192
"""Blocks asked for in one round: the first, doubled after each, up to the largest (some 8 ms of the server's time)."""
BLOCK_TTL_S = 6 * 3600.0
RECORDS_MAX = 1000
"""Records put in one script."""

_RECORDS = Script.load("records")
_VERSION = Script.load("version")
_SLOTS = Script.load("slots")


@dataclass(frozen=True, slots=True)
class Lookup:
    """`values[i]`: the holders of block i; shorter than the keys where nobody holds a block in the last window read.

    `version`: of the fleet's records; one other than the last seen means they have to be read again. `lost`: partitions
    asked that know of no version: never written to, or wiped. What they hold is unknown, not nothing.
    """

    values: list[bytes | None]
    version: int
    lost: frozenset[int] = frozenset()


class RedisStore:
    """Every call that goes to the store raises `StoreUnavailable`."""

    def __init__(self, client: RedisClient, *, block_ttl_s: float = BLOCK_TTL_S) -> None:
        self._client = client
        self._writes = RedisWrites(client, block_ttl_s=block_ttl_s)
        self._blocks = [block_keys(client, partition) for partition in range(client.partitions)]
        self._version = [client.key(partition, "v") for partition in range(client.partitions)]
        self._records = client.key(0, "engines")

    @property
    def partitions(self) -> int:
        return self._client.partitions

    # -- reading -------------------------------------------------------------------------------------------------------

    async def lookup(self, keys: PromptKeys) -> Lookup:
        """Who holds the blocks of a prompt, from the first on: one round to all partitions per window."""
        packed = key_array(keys)
        values: list[bytes | None] = []
        versions: dict[int, int] = {}
        window = WINDOW_FIRST
        while len(values) < len(packed):
            found = await self._window(packed[len(values) : len(values) + window], versions)
            values += found
            if None in found:
                break
            window = min(2 * window, WINDOW_MAX)
        if not versions:
            versions[0] = await self.version()
        lost = frozenset(partition for partition, version in versions.items() if not version)
        return Lookup(values, max(versions.values()), lost)

    async def _window(self, keys: Keys, versions: dict[int, int]) -> list[bytes | None]:
        timeout_s = self._client.timeouts.lookup_s
        if self.partitions == 1:
            data = [mget_command(self._blocks[0], keys, self._version[0])]
            ((held,),) = await self._client.round([Request(0, data)], timeout_s=timeout_s)
            versions[0] = int(held.pop(0) or 0)
            found: list[bytes | None] = held
            return found
        of = keys % np.uint64(self.partitions)
        asked = [(p, np.flatnonzero(of == p)) for p in range(self.partitions)]
        asked = [(p, places) for p, places in asked if len(places)]
        requests = [Request(p, [mget_command(self._blocks[p], keys[at], self._version[p])]) for p, at in asked]
        answers = await self._client.round(requests, timeout_s=timeout_s)
        values: list[bytes | None] = [None] * len(keys)
        for (partition, places), (held,) in zip(asked, answers, strict=True):
            versions[partition] = int(held.pop(0) or 0)
            for place, value in zip(places.tolist(), held, strict=True):
                values[place] = value
        return values

    async def scan(self, numbers: Collection[int]) -> AsyncIterator[list[tuple[int, int, int]]]:
        """All that is held in these slots: batches of (key, slot number, copies); one may come twice."""
        wanted = np.fromiter(numbers, dtype=np.uint32)
        for partition in range(self.partitions):
            async for batch in all_blocks(self._client, partition):
                held = Holders.of(batch.values)
                at = np.flatnonzero(np.isin(held.numbers, wanted))
                if len(at):
                    keys = batch.keys[held.block[at]].tolist()
                    yield list(zip(keys, held.numbers[at].tolist(), held.copies[at].tolist(), strict=True))

    async def version(self) -> int:
        """Of the fleet's records; 0 where there are none."""
        return int(await self._client.command(0, "GET", self._version[0]) or 0)

    async def records(self) -> tuple[int, dict[str, bytes]]:
        """The version, and all records by engine; they may be newer than the version, never older."""
        version, flat = await self._client.pipeline(0, [("GET", self._version[0]), ("HGETALL", self._records)])
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return int(version or 0), {engine.decode(): record for engine, record in pairs}

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(
        self, writes: Sequence[Write], fence: int, position: Position, *, whole: bool = False
    ) -> list[Outcome]:
        """One engine's blocks, one outcome per write; `whole`: all it holds in these partitions, published again.

        A partition without blocks needs a `Write` too (an empty one), or it stays where it was. What `whole` does not
        name is not taken out: publish under new slot numbers, and retire the old ones.
        """
        return await self._writes.write([Flush(write, fence, position, whole) for write in writes])

    async def write_all(self, flushes: Sequence[Flush]) -> list[Outcome]:
        """Several engines' writes in the same rounds; one outcome each."""
        return await self._writes.write(flushes)

    async def raise_fence(self, engine: EngineId, fence: int) -> list[Position | None] | None:
        """Where each partition stands (None: nothing to build on); None in place of the list: a higher fence exists."""
        return await self._writes.raise_fence(engine, fence)

    async def positions(self, engines: Collection[tuple[EngineId, int]]) -> dict[EngineId, list[Outcome]]:
        """Whether each partition still has what this shard wrote, for idle (engine, fence): OK, FENCED or BEHIND."""
        return await self._writes.check(engines)

    def forget(self, engine: EngineId) -> None:
        """This shard owns the engine no more."""
        self._writes.forget(engine)

    async def put_records(self, records: Mapping[str, tuple[int, bytes]]) -> frozenset[str]:
        """Engine -> (the writer's fence, record). Returns the engines refused: they have another owner."""
        return await self._put([(engine, fence, record) for engine, (fence, record) in records.items()])

    async def remove_record(self, engine: EngineId, fence: int) -> bool:
        """False: refused, the engine has another owner."""
        return not await self._put([(str(engine), fence, b"")])

    async def _put(self, changes: Sequence[tuple[str, int, bytes]]) -> frozenset[str]:
        refused: set[str] = set()
        version: Any = 0
        for start in range(0, len(changes), RECORDS_MAX):
            some = changes[start : start + RECORDS_MAX]
            fences = [self._client.key(0, f"f{engine.partition('/dp')[0]}") for engine, _, _ in some]
            arguments = [argument for change in some for argument in change]
            keys = [self._records, self._version[0], *fences]
            version, *names = await self._client.script(0, _RECORDS, keys, arguments)
            refused |= {name.decode() for name in names}
        if len(refused) < len(changes):
            await self._client.round(
                [
                    Request(partition, [self._client.call(_VERSION, [self._version[partition]], [version])])
                    for partition in range(1, self.partitions)
                ]
            )
        return frozenset(refused)

    # -- slots ---------------------------------------------------------------------------------------------------------

    async def allocate_slots(self, count: int, *, above: int = 0) -> range:
        """Numbers never given out before, and above any this caller knows of. A count of 1 to 65,536."""
        if not 1 <= count <= 65_536:
            raise ValueError(f"{count} slot numbers at once: 1 to 65,536")
        first = await self._client.script(0, _SLOTS, [self._client.key(0, "slot")], [count, above])
        return range(first, first + count)

    async def retire(self, numbers: Collection[int]) -> None:
        """Nobody's any more, and in no record: the sweep takes them out of the blocks."""
        if numbers:
            await self._client.command(0, "SADD", self._client.key(0, "dead"), *numbers)

    async def unswept(self) -> int:
        """Slots retired and not yet taken out."""
        return int(await self._client.command(0, "SCARD", self._client.key(0, "dead")))
