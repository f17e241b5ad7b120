"""What the index knows of one engine beside its blocks, and how that reads as an `EngineView`."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.fleet import EngineView, Health, Sync
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.engine import Engine
from kvatlas_indexer.core.naming import Expected


@dataclass(slots=True)
class Known:
    engine: Engine
    spec: EngineSpec | None = None
    facts: EngineFacts | None = None
    alive_at: float = 0.0  # last heard of: a message, or a probe it answered
    down_since: float | None = None
    speaks: bool = False  # it has been listened to: it needs no discovery to be known
    forgotten: bool = False
    status: tuple[object, ...] = ()  # what of the engine's state its view shows

    @property
    def id(self) -> EngineId:
        return self.engine.id

    @property
    def ready(self) -> bool:
        return self.facts is not None and self.facts.health is Health.READY

    @property
    def wanted(self) -> bool:
        """Whether discovery names it."""
        return self.spec is not None and self.id.rank < self.spec.ranks

    def status_now(self) -> tuple[object, ...]:
        stream, naming = self.engine.stream, self.engine.naming
        return (self.engine.status, stream.last is None, naming.profile, naming.verified, naming.block_size)

    def view(self, expected: Expected) -> EngineView:
        facts, naming, (sync, reason) = self.facts or EngineFacts(self.id), self.engine.naming, self.engine.status
        size = naming.block_size or expected.block_size
        profile = naming.profile or _assumed(expected, size)
        return EngineView(
            id=self.id,
            url=self.spec.url if self.spec else f"http://{self.id.address}",
            models=facts.models,
            adapters=facts.adapters,
            root=facts.root,
            health=Health.DOWN if self.down_since is not None else facts.health,
            profile=profile.name if profile else None,
            profile_verified=naming.verified,
            block_size=size,
            sync=sync,
            inexact_reason=reason,
            max_model_len=facts.max_model_len,
            kv_tokens=facts.cache.gpu_tokens if facts.cache else None,
            labels=self.spec.labels if self.spec else (),
        )

    def can_be_matched(self, view: EngineView) -> bool:
        """Whether anything can be said of its cache: unknown is not empty."""
        return view.profile is not None and (self.engine.stream.last is not None or view.sync is Sync.EXACT)


def _assumed(expected: Expected, block_size: int | None) -> HashProfile | None:
    """What a router may assume of an engine whose profile no root has proven yet."""
    return next(iter(expected.profiles(block_size)), None) if block_size else None
