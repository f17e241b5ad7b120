"""What gRPC and REST ask: the index, wherever residency is kept, with what routers report on top of it.

Each watcher is told what differs from what it was told last, whenever it asks for more: a slow one misses the steps in
between, and nothing piles up for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from kvatlas_common.fleet import Fleet, Load
from kvatlas_common.matching import Holder, MatchAnswer, Prompts
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import FleetDelta, Lookups
from kvatlas_indexer.core.loads import LoadBoard, Telling
from kvatlas_indexer.core.routing import Routing


class Front:
    """`contracts.Index`. `clock` is monotonic."""

    def __init__(self, lookups: Lookups, routing: Routing, board: LoadBoard, clock: Callable[[], float]) -> None:
        self.lookups = lookups
        self._routing = routing
        self._board = board
        self._clock = clock
        self._changed = asyncio.Event()

    async def match(
        self,
        model: str,
        prompts: Prompts,
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        if estimate:
            return self._routing.estimate(self.fleet(), model, prompts, engines, self._clock())
        answer = await self.lookups.match(model, prompts, engines)
        return self._routing.expect(answer, self.fleet(), model, prompts, engines)

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        return await self.lookups.holders(model, keys)

    def fleet(self) -> Fleet:
        return self.lookups.fleet()

    def load(self, engine: EngineId) -> Load:
        return self._board.load(engine)

    def wake(self) -> None:
        """The fleet has changed, or a load."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self, router: str = "") -> AsyncIterator[FleetDelta]:
        told, changed, loads = self.fleet(), self._changed, Telling(self._board, router)
        yield FleetDelta(snapshot=True, changed=tuple(told.engines.values()), loads=loads.news())
        while True:
            await changed.wait()
            changed, fleet = self._changed, self.fleet()
            delta = _difference(told, fleet, loads)
            told = fleet
            if delta.changed or delta.removed or delta.loads:
                yield delta


def _difference(told: Fleet, fleet: Fleet, loads: Telling) -> FleetDelta:
    if fleet is told:
        return FleetDelta(snapshot=False, loads=loads.news())
    return FleetDelta(
        snapshot=False,
        changed=tuple(view for view in fleet.engines.values() if told.engines.get(view.id) != view),
        removed=tuple(engine for engine in told.engines if engine not in fleet.engines),
        loads=loads.news(),
    )
