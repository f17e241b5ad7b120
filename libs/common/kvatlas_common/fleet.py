"""The fleet as one value: what is known of every engine at a moment.

An indexer shard builds it (from discovery, probes and event streams) and sends it over `WatchFleet`; a router builds it
from that, or from its own list. `EngineView` is immutable: a change is a new view, so a reader never sees half of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from kvatlas_common.words import EngineId


class Health(StrEnum):
    """Whether requests may be sent to an engine."""

    UNKNOWN = "unknown"  # never probed: usable, but any ready engine goes first
    READY = "ready"
    DOWN = "down"  # probes fail, or its lease ran out


class Sync(StrEnum):
    """How far the index can be believed about an engine. Unknown is not empty."""

    UNKNOWN = "unknown"  # no event stream seen yet
    SYNCING = "syncing"  # replaying what was missed
    EXACT = "exact"
    INEXACT = "inexact"  # usable, but `inexact_reason` says what is missing


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as `/v1/models` lists it, served under `name`; `path`: its `root`; `number`: its place, from 1."""

    name: str
    path: str | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class InFlight:
    """Requests that routers have in flight at an engine.

    `prefilling`: those without a first token; `prefill_tokens`: their prompt tokens not expected in the cache.
    """

    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The prompt an engine is computing, as far as can be told: the oldest that any router waits for there.

    `tokens`: to be computed of it, 0 if it is the router's own who is told. `since`: when it became the oldest, in
    seconds of the reader's monotonic clock.
    """

    tokens: int = 0
    since: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of an engine's load: its own figures from `/metrics`, and what other routers have in flight there.

    `kv_usage` is 0..1; `scraped_at` in seconds since the epoch, 0 where the figures are not known; `loras`: adapters
    that requests run with or wait for.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    scraped_at: float = 0.0
    loras: frozenset[str] = frozenset()
    others: InFlight = InFlight()
    head: Head = Head()


@dataclass(frozen=True, slots=True)
class EngineView:
    """What is known of one engine (one rank), but for its load: that changes all the time, and goes beside it."""

    id: EngineId
    url: str  # base URL of its HTTP API, without a trailing slash
    models: frozenset[str] = frozenset()  # served model names, adapters included; empty: not known yet
    adapters: tuple[Adapter, ...] = ()
    root: str | None = None  # path or hub name of the model's files, as `/v1/models` gives it
    health: Health = Health.UNKNOWN
    profile: str | None = None  # `HashProfile.name` its keys are made with; None: not known yet
    profile_verified: bool = False
    block_size: int | None = None
    sync: Sync = Sync.UNKNOWN
    inexact_reason: str = ""
    max_model_len: int | None = None
    kv_tokens: int | None = None  # what its gpu cache can hold
    labels: tuple[tuple[str, str], ...] = ()  # sorted by name: what its operator calls it

    @property
    def known_empty(self) -> bool:
        """Every event of it is known, and it has stored nothing yet: so nothing shows its profile."""
        return self.profile is None and self.sync is Sync.EXACT

    def serves(self, model: str) -> bool:
        """True too while the engine's model names are not known: it may."""
        return not self.models or model in self.models

    def labelled(self, wanted: Iterable[tuple[str, str]]) -> bool:
        """Whether it has all of these labels."""
        return all(label in self.labels for label in wanted)

    def adapter(self, model: str) -> Adapter | None:
        return next((a for a in self.adapters if a.name == model), None)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All engines known, by id."""

    engines: Mapping[EngineId, EngineView] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, views: Iterable[EngineView]) -> Fleet:
        return cls(MappingProxyType({v.id: v for v in sorted(views, key=lambda v: v.id)}))

    def updated(self, changed: Iterable[EngineView], removed: Iterable[EngineId] = ()) -> Fleet:
        gone = frozenset(removed)
        kept = {i: v for i, v in self.engines.items() if i not in gone}
        return Fleet.of((kept | {v.id: v for v in changed}).values())

    def up(self) -> tuple[EngineView, ...]:
        """Engines not known to be down, in the order of their ids."""
        return tuple(v for v in self.engines.values() if v.health is not Health.DOWN)

    def serving(self, model: str) -> tuple[EngineView, ...]:
        """Engines a request for `model` may go to, in the order of their ids: those not known to be down."""
        return tuple(v for v in self.engines.values() if v.health is not Health.DOWN and v.serves(model))

    def models(self) -> tuple[str, ...]:
        return tuple(sorted({m for v in self.engines.values() for m in v.models}))
