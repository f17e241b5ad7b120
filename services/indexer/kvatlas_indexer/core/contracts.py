"""What the adapters of the indexer see of its core, and what they give it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvatlas_common.fleet import EngineView, Fleet
from kvatlas_common.matching import Holder, MatchAnswer
from kvatlas_common.words import EngineId


@dataclass(frozen=True, slots=True)
class FleetDelta:
    """A change of the fleet; with `snapshot`, `changed` is all of it."""

    snapshot: bool
    changed: tuple[EngineView, ...] = ()
    removed: tuple[EngineId, ...] = ()


class UnknownModel(LookupError):
    """No engine of the fleet serves this model."""


class IndexUnavailable(Exception):
    """The store cannot be asked just now: not the same as nobody holding anything."""


class Index(Protocol):
    """What a lookup needs, whoever asks and wherever residency is kept."""

    async def match(
        self, model: str, prompts: Mapping[str, Sequence[int]], engines: Collection[EngineId] = ()
    ) -> MatchAnswer:
        """`prompts`: hash profile name -> the prompt's block keys under it. `engines`: only these; empty, all.

        Raises `UnknownModel`, `IndexUnavailable`.
        """
        ...

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        """Who holds each of these blocks, related or not. Raises `UnknownModel`, `IndexUnavailable`."""
        ...

    def fleet(self) -> Fleet: ...

    def watch(self) -> AsyncIterator[FleetDelta]:
        """A snapshot, then changes, until the iterator is closed. A slow reader gets a new snapshot, not a backlog."""
        ...
