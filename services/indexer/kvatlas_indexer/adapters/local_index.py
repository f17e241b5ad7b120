"""The index of this process, as lookups see it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvatlas_common.fleet import Fleet
from kvatlas_common.matching import Holder, MatchAnswer, Prompts
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.index import KvIndex


class LocalIndex:
    """`contracts.Lookups` over a `KvIndex` in the same event loop."""

    def __init__(self, index: KvIndex) -> None:
        self._index = index

    async def match(self, model: str, prompts: Prompts, engines: Collection[EngineId] = ()) -> MatchAnswer:
        return self._index.match(model, prompts, engines)

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        return tuple(self._index.holders(model, key) for key in keys)

    def fleet(self) -> Fleet:
        return self._index.fleet()
