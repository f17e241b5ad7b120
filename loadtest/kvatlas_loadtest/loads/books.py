"""Which requests routers have where, as each of them knows it: its own at once, other routers' a little later.

For the baselines: the router's core keeps its own books, and hears of other routers through the indexer.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import count

from kvatlas_common.words import EngineId
from kvatlas_loadtest.loads.routing import Flying


class Books:
    """Of all routers. `share_s`: until a router hears what another one did. Times never go back."""

    def __init__(self, routers: int, engines: Sequence[EngineId], share_s: float) -> None:
        self._share_s = share_s
        self._own = [{engine: Flying() for engine in engines} for _ in range(routers)]
        self._heard = [{engine: Flying() for engine in engines} for _ in range(routers)]
        self._due: list[tuple[float, int, int, EngineId, Flying]] = []
        self._counter = count()

    def change(self, router: int, engine: EngineId, change: Flying, at_s: float) -> None:
        self._own[router][engine].add(change)
        if len(self._own) > 1:
            heapq.heappush(self._due, (at_s + self._share_s, next(self._counter), router, engine, change))

    def of(self, router: int, now: float) -> Mapping[EngineId, Flying]:
        """All routers' together, as `router` knows them at `now`."""
        if len(self._own) == 1:
            return self._own[0]
        while self._due and self._due[0][0] <= now:
            _, _, teller, engine, change = heapq.heappop(self._due)
            self._heard[teller][engine].add(change)
        total: dict[EngineId, Flying] = {}
        for engine, own in self._own[router].items():
            flying = total[engine] = Flying(own.requests, own.prefill_tokens, own.blocks)
            for teller, heard in enumerate(self._heard):
                if teller != router:
                    flying.add(heard[engine])
        return total
