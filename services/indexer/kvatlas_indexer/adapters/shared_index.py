"""The index of all shards, read from the shared store: what any shard answers, whoever owns the engines.

The fleet's records are kept, and read again when their version moves: a lookup brings the version along, and idle times
are bridged by polling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from kvatlas_common.fleet import Fleet
from kvatlas_common.matching import Holder, MatchAnswer, PromptKeys, Prompts
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import StoreUnavailable
from kvatlas_indexer.adapters.redis_store import WINDOW_FIRST, Lookup
from kvatlas_indexer.core.contracts import IndexUnavailable
from kvatlas_indexer.core.records import EngineRecord, decode_record
from kvatlas_indexer.core.shared import SharedFleet

log = logging.getLogger(__name__)

POLL_S = 0.1
RETRY_S = 0.5


class SharedStore(Protocol):
    """What is read of a `RedisStore`, and answered as it does."""

    async def lookup(self, keys: PromptKeys) -> Lookup: ...
    async def version(self) -> int: ...
    async def records(self) -> tuple[int, dict[str, bytes]]: ...


class SharedIndex:
    """`contracts.Lookups` over a `RedisStore`.

    `on_change`: called when the fleet may have changed; `on_emptied`: with engines whose cache is another's, or empty.
    """

    def __init__(
        self, store: SharedStore, *, on_change: Callable[[], None], on_emptied: Callable[[EngineId], None]
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._on_emptied = on_emptied
        self._shared = SharedFleet()
        self._version = 0
        self._decoded: dict[str, tuple[bytes, EngineRecord]] = {}
        self._reading = asyncio.Lock()
        self.errors = 0  # of reading the fleet's records; those of lookups are theirs

    async def match(self, model: str, prompts: Prompts, engines: Collection[EngineId] = ()) -> MatchAnswer:
        plans, _ = self._shared.plan(model)
        asked = {profile: keys for profile, keys in prompts.items() if profile in plans}
        lookups = [self._store.lookup(keys) for keys in asked.values()]
        # A fleet normally has one profile: no task, and no further turn of the loop, for a single lookup.
        found = [await lookups[0]] if len(lookups) == 1 else await asyncio.gather(*lookups)
        await self._keep_up(found)
        return self._answer(model, dict(zip(asked, found, strict=True)), engines)

    def _answer(self, model: str, found: Mapping[str, Lookup], engines: Collection[EngineId]) -> MatchAnswer:
        plans, unknown = self._shared.plan(model)
        matched: list[MatchAnswer] = []
        for profile, plan in plans.items():
            if (lookup := found.get(profile)) is not None:
                matched.append(plan.match(self._shared.masks(lookup.values)))
            else:
                unknown += tuple(plan.engines)
        return MatchAnswer.joined(matched, unknown).among(engines)

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        windows = [keys[start : start + WINDOW_FIRST] for start in range(0, len(keys), WINDOW_FIRST)]
        found = [await self._store.lookup(window) for window in windows]  # each is answered to its end
        await self._keep_up(found)
        return tuple(self._shared.holders(model, value) for lookup in found for value in lookup.values)

    def fleet(self) -> Fleet:
        return self._shared.fleet

    def live_slots(self) -> frozenset[int]:
        """The slot numbers in the records of all engines."""
        return self._shared.live_slots

    async def run(self) -> None:
        """Keeps the fleet up to date until cancelled."""
        said = ""
        while True:
            try:
                await self._read(await self._store.version())
                said = ""
            except StoreUnavailable as error:
                self.errors += 1
                if str(error) != said:
                    log.warning("the store cannot be asked", extra={"why": str(error)})
                said = str(error)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(POLL_S)

    async def _keep_up(self, lookups: Sequence[Lookup]) -> None:
        """Raises `IndexUnavailable` where the store has lost what was looked up: that is not the same as nobody."""
        newest = max((lookup.version for lookup in lookups), default=self._version)
        if newest > self._version:
            await self._read(newest)
        if any(lookup.lost for lookup in lookups):
            raise IndexUnavailable("the store has lost the index; its owners are publishing it again")

    async def _read(self, version: int) -> None:
        if version == self._version:
            return
        async with self._reading:
            if version == self._version:  # somebody else has read it meanwhile
                return
            self._version, records = await self._store.records()
        self._shared = SharedFleet(record for engine, data in records.items() if (record := self._decode(engine, data)))
        self._decoded = {engine: self._decoded[engine] for engine in records if engine in self._decoded}
        self._on_change()

    def _decode(self, engine: str, data: bytes) -> EngineRecord | None:
        before = self._decoded.get(engine)
        if before is not None and before[0] == data:
            return before[1]
        try:
            record = decode_record(data)
        except ValueError as error:
            log.warning("a record in the store is passed over", extra={"engine": engine, "why": str(error)})
            return None
        if before is not None and not before[1].lives_on_in(record):
            self._on_emptied(record.view().id)
        self._decoded[engine] = (data, record)
        return record
