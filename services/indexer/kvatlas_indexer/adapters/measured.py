"""Lookups counted and timed, for gRPC and REST alike: a wrapper around what both of them ask."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence

from kvatlas_common.fleet import Fleet, Load
from kvatlas_common.matching import Holder, MatchAnswer, Prompts
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import FleetDelta, Index, IndexUnavailable, UnknownModel
from kvatlas_indexer.core.durations import Durations


class MeasuredIndex:
    """`contracts.Index`. `results`: found, nothing (nobody holds any of it), unknown-model, unavailable, defect."""

    def __init__(self, inner: Index) -> None:
        self._inner = inner
        self.results: Counter[str] = Counter()
        self.durations = Durations()

    async def match(
        self,
        model: str,
        prompts: Prompts,
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        began, result = time.perf_counter(), "defect"
        try:
            answer = await self._inner.match(model, prompts, engines, estimate=estimate)
            result = "found" if answer.found else "nothing"
        except UnknownModel:
            result = "unknown-model"
            raise
        except IndexUnavailable:
            result = "unavailable"
            raise
        finally:
            self.results[result] += 1
            self.durations.add(time.perf_counter() - began)
        return answer

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        return await self._inner.holders(model, keys)

    def fleet(self) -> Fleet:
        return self._inner.fleet()

    def load(self, engine: EngineId) -> Load:
        return self._inner.load(engine)

    def watch(self, router: str = "") -> AsyncIterator[FleetDelta]:
        return self._inner.watch(router)
