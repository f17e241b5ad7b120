"""The index of this process as the gRPC and REST adapters ask it, and who watches its fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

from kvatlas_common.fleet import Fleet
from kvatlas_common.matching import Holder, MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import FleetDelta
from kvatlas_indexer.core.index import KvIndex


class Watchers:
    """Those who are told what changes in a fleet.

    Each is told what differs from what it was told last, whenever it asks for more: a slow one misses the steps in
    between, and nothing piles up for it.
    """

    def __init__(self, fleet: Callable[[], Fleet]) -> None:
        self._fleet = fleet
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """The fleet has changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> AsyncIterator[FleetDelta]:
        told, changed = self._fleet(), self._changed
        yield FleetDelta(snapshot=True, changed=tuple(told.engines.values()))
        while True:
            await changed.wait()
            changed, fleet = self._changed, self._fleet()
            delta = FleetDelta(
                snapshot=False,
                changed=tuple(view for view in fleet.engines.values() if told.engines.get(view.id) != view),
                removed=tuple(engine for engine in told.engines if engine not in fleet.engines),
            )
            told = fleet
            if delta.changed or delta.removed:
                yield delta


class LocalIndex:
    """`contracts.Index` over a `KvIndex` in the same event loop."""

    def __init__(self, index: KvIndex) -> None:
        self._index = index
        self._watchers = Watchers(index.fleet)

    async def match(
        self, model: str, prompts: Mapping[str, Sequence[int]], engines: Collection[EngineId] = ()
    ) -> MatchAnswer:
        return self._index.match(model, prompts, engines)

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        return tuple(self._index.holders(model, key) for key in keys)

    def fleet(self) -> Fleet:
        return self._index.fleet()

    def fleet_changed(self) -> None:
        """Wakes the watchers."""
        self._watchers.wake()

    def watch(self) -> AsyncIterator[FleetDelta]:
        return self._watchers.watch()
