"""Matching plans per model and hash profile: derived when first asked for, kept while what they rest on stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.match import Plan

MODELS_MAX = 256
"""Models planned for at once. While an engine's model names are not known, any name may be asked for."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    by_profile: dict[str, Plan]
    unknown: tuple[EngineId, ...]  # engines that serve the model, and of whose cache nothing can be said

    @classmethod
    def of(cls, engines: Iterable[tuple[Known, EngineView]]) -> ModelPlan:
        by_profile: dict[str, list[Known]] = {}
        unknown: list[EngineId] = []
        for known, view in engines:
            if view.profile is not None and known.can_be_matched(view):
                by_profile.setdefault(view.profile, []).append(known)
            else:
                unknown.append(known.id)
        plans = {profile: Plan([k.engine.groups() for k in group]) for profile, group in by_profile.items()}
        return cls(plans, tuple(unknown))


class Plans:
    """`version`: of all a plan is derived from."""

    def __init__(self) -> None:
        self._version: tuple[int, int] = (-1, -1)
        self._models: dict[str, ModelPlan] = {}

    def get(self, model: str, version: tuple[int, int]) -> ModelPlan | None:
        if version != self._version or len(self._models) >= MODELS_MAX:
            self._version, self._models = version, {}
        return self._models.get(model)

    def keep(self, model: str, plan: ModelPlan) -> ModelPlan:
        self._models[model] = plan
        return plan


def matters(view: EngineView | None) -> object:
    """What of a view matching rests on."""
    return view and (view.models, view.health is Health.DOWN, view.profile, view.block_size, view.sync)
