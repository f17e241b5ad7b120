"""The fleet as this router sees it, from several sources that know different things.

1. Indexers whose `WatchFleet` stream is up: they know caches, and normally health. Where they know an engine, they win;
   of two indexers that know it, the one whose stream of its events is in the better state.
2. The router's own list (static, file, DNS): engines no indexer knows. Its own probes fill in what nobody told.
3. The last known fleet, from disk or from indexers since lost: used where no indexer is up or one has just come up and
   may not have found its engines yet. It is believed about names, addresses and profiles, not about health.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from kvatlas_common.fleet import EngineView, Fleet, Health, Sync
from kvatlas_common.words import EngineId

_SYNC_ORDER = {Sync.EXACT: 0, Sync.INEXACT: 1, Sync.SYNCING: 2, Sync.UNKNOWN: 3}
_HEALTH_ORDER = {Health.READY: 0, Health.DOWN: 1, Health.UNKNOWN: 2}

Views = Mapping[EngineId, EngineView]


def told(indexers: Iterable[Fleet]) -> Fleet:
    """What the indexers that are up say, together."""
    best: dict[EngineId, EngineView] = {}
    for fleet in indexers:
        for engine, view in fleet.engines.items():
            best[engine] = min(best.get(engine, view), view, key=_standing)
    return Fleet.of(best.values())


def merged(indexed: Fleet, listed: Views, probed: Views, remembered: Fleet) -> Fleet:
    """`indexed`: as `told`; `listed`: the router's list, bare; `probed`: what its own probes found."""
    before = {e: as_remembered(v) for e, v in remembered.engines.items()}
    known = {**listed, **before, **indexed.engines}
    return Fleet.of(_completed(view, probed.get(engine), listed.get(engine)) for engine, view in known.items())


def as_remembered(view: EngineView) -> EngineView:
    """What of a view still holds when nobody vouches for it any more."""
    return replace(view, health=Health.UNKNOWN, sync=Sync.UNKNOWN, inexact_reason="")


def needing_probes(fleet: Fleet, indexed: Fleet) -> tuple[EngineId, ...]:
    """Engines of whose health no indexer says anything."""
    said = {e for e, v in indexed.engines.items() if v.health is not Health.UNKNOWN}
    return tuple(e for e in fleet.engines if e not in said)


def _standing(view: EngineView) -> tuple[int, int]:
    return _SYNC_ORDER[view.sync], _HEALTH_ORDER[view.health]


def _completed(view: EngineView, probed: EngineView | None, listed: EngineView | None) -> EngineView:
    if listed is not None and not view.labels and listed.labels:
        view = replace(view, labels=listed.labels)
    if probed is None:
        return view
    return replace(
        view,
        models=view.models or probed.models,
        adapters=view.adapters or probed.adapters,
        root=view.root or probed.root,
        health=probed.health if view.health is Health.UNKNOWN else view.health,
        block_size=view.block_size or probed.block_size,
        max_model_len=view.max_model_len or probed.max_model_len,
        kv_tokens=view.kv_tokens or probed.kv_tokens,
    )
