"""Which requests routers have where, as each of them knows it: its own at once, other routers' a little later."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import count

from kvatlas_common.words import EngineId
from kvatlas_loadtest.loads.routing import InFlight


class Books:
    """Of all routers. `share_s`: until a router hears what another one did. Times never go back."""

    def __init__(self, routers: int, engines: Sequence[EngineId], share_s: float) -> None:
        self._share_s = share_s
        self._own = [{engine: InFlight() for engine in engines} for _ in range(routers)]
        self._heard = [{engine: InFlight() for engine in engines} for _ in range(routers)]
        self._nothing = {engine: InFlight() for engine in engines}
        self._engines = engines
        self._due: list[tuple[float, int, int, EngineId, InFlight]] = []
        self._counter = count()

    def change(self, router: int, engine: EngineId, change: InFlight, at_s: float) -> None:
        self._own[router][engine].add(change)
        if len(self._own) > 1:
            heapq.heappush(self._due, (at_s + self._share_s, next(self._counter), router, engine, change))

    def own(self, router: int) -> Mapping[EngineId, InFlight]:
        return self._own[router]

    def others(self, router: int, now: float) -> Mapping[EngineId, InFlight]:
        """All other routers' together, as `router` has heard of them by `now`."""
        if len(self._own) == 1:
            return self._nothing
        while self._due and self._due[0][0] <= now:
            _, _, teller, engine, change = heapq.heappop(self._due)
            self._heard[teller][engine].add(change)
        total = {engine: InFlight() for engine in self._engines}
        for teller, heard in enumerate(self._heard):
            if teller != router:
                for engine, flying in heard.items():
                    total[engine].add(flying)
        return total
