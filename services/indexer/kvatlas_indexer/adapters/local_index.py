"""The index of this process as the gRPC and REST adapters ask it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

from kvatlas_common.fleet import Fleet
from kvatlas_common.matching import Holder, MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import FleetDelta
from kvatlas_indexer.core.index import KvIndex


class LocalIndex:
    """`contracts.Index` over a `KvIndex` in the same event loop.

    A watcher is told what differs from what it was told last, whenever it asks for more: a slow one misses steps in
    between, and nothing piles up for it.
    """

    def __init__(self, index: KvIndex) -> None:
        self._index = index
        self._changed = asyncio.Event()

    async def match(
        self, model: str, prompts: Mapping[str, Sequence[int]], engines: Collection[EngineId] = ()
    ) -> MatchAnswer:
        return self._index.match(model, prompts, engines)

    async def holders(self, model: str, key: int) -> tuple[Holder, ...]:
        return self._index.holders(model, key)

    def fleet(self) -> Fleet:
        return self._index.fleet()

    def fleet_changed(self) -> None:
        """Wakes the watchers."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> AsyncIterator[FleetDelta]:
        told = self._index.fleet()
        changed = self._changed
        yield FleetDelta(snapshot=True, changed=tuple(told.engines.values()))
        while True:
            await changed.wait()
            changed, fleet = self._changed, self._index.fleet()
            delta = FleetDelta(
                snapshot=False,
                changed=tuple(view for view in fleet.engines.values() if told.engines.get(view.id) != view),
                removed=tuple(engine for engine in told.engines if engine not in fleet.engines),
            )
            told = fleet
            if delta.changed or delta.removed:
                yield delta
