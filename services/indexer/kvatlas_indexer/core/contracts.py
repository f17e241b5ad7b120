"""What the adapters of the indexer see of its core, and what they give it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvatlas_common.fleet import EngineView, Fleet, Load
from kvatlas_common.matching import Holder, MatchAnswer, Prompts
from kvatlas_common.observations import Observation
from kvatlas_common.words import EngineId


@dataclass(frozen=True, slots=True)
class FleetDelta:
    """A change of the fleet or of loads; with `snapshot`, `changed` and `loads` are all there is."""

    snapshot: bool
    changed: tuple[EngineView, ...] = ()
    removed: tuple[EngineId, ...] = ()
    loads: tuple[tuple[EngineId, Load], ...] = ()


class UnknownModel(LookupError):
    """No engine of the fleet serves this model."""


class IndexUnavailable(Exception):
    """The store cannot be asked just now: not the same as nobody holding anything."""


class Lookups(Protocol):
    """The residency, wherever it is kept, and the fleet it is of."""

    async def match(self, model: str, prompts: Prompts, engines: Collection[EngineId] = ()) -> MatchAnswer:
        """`prompts`: hash profile name -> the prompt's block keys under it. `engines`: only these; empty, all.

        Raises `UnknownModel`, `IndexUnavailable`.
        """
        ...

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        """Who holds each of these blocks, related or not. Raises `UnknownModel`, `IndexUnavailable`."""
        ...

    def fleet(self) -> Fleet: ...


class Index(Protocol):
    """What routers and people ask."""

    async def match(
        self,
        model: str,
        prompts: Prompts,
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        """As `Lookups.match`, with what is expected; or, with `estimate`, from where prompts were routed."""
        ...

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        """As `Lookups.holders`."""
        ...

    def fleet(self) -> Fleet: ...

    def load(self, engine: EngineId) -> Load:
        """As this shard knows it."""
        ...

    def watch(self, router: str = "") -> AsyncIterator[FleetDelta]:
        """A snapshot, then changes, until the iterator is closed. A slow reader gets fewer and larger ones.

        Loads are as `router` is to see them: without its own requests.
        """
        ...


class Reports(Protocol):
    """Who is told what routers report. A router is known by the name it gives; without one, by its connection."""

    def joined(self, router: str) -> None:
        """A stream of reports begins; it begins with the requests in flight."""
        ...

    def reported(self, router: str, observation: Observation) -> None: ...

    def left(self, router: str) -> None: ...
