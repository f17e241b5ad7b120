"""What a shard makes of the routers' reports: estimates, predicted residency, and what is in flight.

Every shard hears every router, so each keeps all of it on its own, and shards need not talk about it. Keys are those of
the engine's own profile; of an engine whose profile is not known, those of the estimate profile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.fleet import EngineView, Fleet, Sync
from kvatlas_common.history import ESTIMATE_PROFILE, RoutingHistory
from kvatlas_common.matching import EngineMatch, MatchAnswer, Prompts
from kvatlas_common.observations import Observation, Routed
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.in_flight import InFlightBook
from kvatlas_indexer.core.predicted import Predicted

HISTORY_BLOCKS_MAX = 32_768
"""Per engine that does not say how much it can hold: 2M tokens in blocks of 64, more than most engines have."""

"""Hash profile name -> the prompt's block keys under it."""

_block_size = lru_cache(maxsize=1024)(lambda name: HashProfile.parse(name).block_size)


class Routing:
    """Not thread-safe. `now` in seconds of any one clock."""

    def __init__(self, *, estimate_ttl_s: float) -> None:
        self.in_flight = InFlightBook()
        self.predicted = Predicted()
        self.history = RoutingHistory(lifetime_s=estimate_ttl_s, blocks_max=HISTORY_BLOCKS_MAX)
        self._fleet = Fleet()  # as last seen

    def observe(self, router: str, observation: Observation, fleet: Fleet, now: float) -> None:
        self.in_flight.observe(router, observation, now)
        keys: Sequence[int] = ()
        view = fleet.engines.get(observation.engine)
        if isinstance(observation, Routed) and view is not None:
            profile = _profile_of(view, observation.keys)
            keys = observation.keys[profile] if profile else ()
            if profile and keys:
                self.history.note(view.id, keys, now, _capacity(view, profile))
        self.predicted.observe((router, observation.request_id), observation, keys, now)

    def on_tick(self, now: float, fleet: Fleet) -> None:
        self.in_flight.on_tick(now)
        self.predicted.on_tick(now)
        if fleet is not self._fleet:
            for engine in self._fleet.engines.keys() - fleet.engines.keys():
                self.forget(engine)
            self._fleet = fleet

    def forget(self, engine: EngineId) -> None:
        """Its cache is empty: it restarted, was cleared, or left."""
        self.history.forget(engine)
        self.predicted.forget(engine)

    # -- what lookups are answered -------------------------------------------------------------------------------------

    def estimate(
        self, fleet: Fleet, model: str, prompts: Prompts, engines: Collection[EngineId], now: float
    ) -> MatchAnswer:
        """From the history. Unknown are engines none of whose keys were given. Raises `UnknownModel`."""
        asked, unknown = _by_profile(_asked(fleet, model, engines), prompts)
        if not asked and not unknown and not any(view.serves(model) for view in fleet.engines.values()):
            raise UnknownModel(model)
        matches: list[EngineMatch] = []
        for profile, views in asked.items():
            found = self.history.leading(prompts[profile], now)
            matches += [
                EngineMatch(view.id, blocks, {Medium.GPU: blocks}, exact=False, expected=blocks)
                for view in views
                if (blocks := found.get(view.id, 0))
            ]
        return MatchAnswer(tuple(matches), unknown)

    def expect(
        self, answer: MatchAnswer, fleet: Fleet, model: str, prompts: Prompts, engines: Collection[EngineId]
    ) -> MatchAnswer:
        """The index's answer, with what is expected of the engines it knows: unknown ones stay unknown."""
        if not len(self.predicted):
            return answer
        expected: dict[EngineId, int] = {}
        for profile, keys in prompts.items():
            for engine, blocks in self.predicted.leading(keys).items():
                view = fleet.engines.get(engine)
                if view is not None and view.profile == profile:
                    expected[engine] = blocks
        if not expected:
            return answer
        answer = answer.expecting(expected)
        left = expected.keys() - answer.blocks().keys() - frozenset(answer.unknown)
        if not left:
            return answer
        nothing_yet = [
            EngineMatch(view.id, 0, {}, view.sync is Sync.EXACT, expected=expected[view.id])
            for view in _asked(fleet, model, engines)
            if view.id in left
        ]
        return MatchAnswer((*answer.listed, *nothing_yet), answer.unknown, answer.plain)


def _asked(fleet: Fleet, model: str, engines: Collection[EngineId]) -> Iterable[EngineView]:
    wanted = frozenset(engines)
    return [view for view in fleet.serving(model) if not wanted or view.id in wanted]


def _by_profile(
    views: Iterable[EngineView], prompts: Prompts
) -> tuple[dict[str, list[EngineView]], tuple[EngineId, ...]]:
    found: dict[str, list[EngineView]] = {}
    unknown: list[EngineId] = []
    for view in views:
        profile = _profile_of(view, prompts)
        if profile is None:
            unknown.append(view.id)
        else:
            found.setdefault(profile, []).append(view)
    return found, tuple(unknown)


def _profile_of(view: EngineView, prompts: Prompts) -> str | None:
    """The profile whose keys name the engine's blocks here."""
    if view.profile in prompts:
        return view.profile
    return ESTIMATE_PROFILE.name if ESTIMATE_PROFILE.name in prompts else None


def _capacity(view: EngineView, profile: str) -> int | None:
    """In blocks of the profile."""
    return None if view.kv_tokens is None else min(view.kv_tokens // _block_size(profile), HISTORY_BLOCKS_MAX)
