"""Who is believed about the fleet."""

from __future__ import annotations

from dataclasses import replace

from kvatlas_common.fleet import EngineView, Fleet, Health, Sync
from kvatlas_common.words import EngineId
from kvatlas_router.core.knowledge import merged, needing_probes, told

A, B, C = (EngineId(f"{n}:8000") for n in "abc")


def view(engine: EngineId, **also: object) -> EngineView:
    return replace(EngineView(engine, f"http://{engine}"), **also)  # type: ignore[arg-type]


NOBODY = Fleet()


def test_of_two_indexers_the_one_with_the_better_stream_wins() -> None:
    behind = Fleet.of([view(A, sync=Sync.SYNCING, profile="p1")])
    exact = Fleet.of([view(A, sync=Sync.EXACT, profile="p2"), view(B)])
    for order in ([behind, exact], [exact, behind]):
        assert told(order).engines[A].profile == "p2"
        assert set(told(order).engines) == {A, B}


def test_indexers_win_over_memory_and_over_the_list() -> None:
    indexed = Fleet.of([view(A, models=frozenset({"m"}), health=Health.DOWN)])
    listed = {A: view(A), B: view(B)}
    remembered = Fleet.of([view(A, models=frozenset({"old"})), view(C)])
    fleet = merged(indexed, listed, {A: view(A, health=Health.READY)}, remembered)
    assert fleet.engines[A].models == {"m"}
    assert fleet.engines[A].health is Health.DOWN
    assert set(fleet.engines) == {A, B, C}


def test_memory_is_not_believed_about_health() -> None:
    remembered = Fleet.of([view(A, health=Health.READY, sync=Sync.EXACT, profile="p", models=frozenset({"m"}))])
    found = merged(NOBODY, {}, {}, remembered).engines[A]
    assert (found.health, found.sync) == (Health.UNKNOWN, Sync.UNKNOWN)
    assert (found.profile, found.models) == ("p", frozenset({"m"}))


def test_own_probes_fill_in_what_nobody_told() -> None:
    probed = view(A, health=Health.READY, models=frozenset({"m"}), root="/models/m", block_size=16)
    found = merged(NOBODY, {A: view(A)}, {A: probed}, NOBODY).engines[A]
    assert found == replace(probed, url="http://a:8000")


def test_probes_of_engines_nobody_names_make_no_engines() -> None:
    assert not merged(NOBODY, {}, {A: view(A)}, NOBODY).engines


def test_only_engines_without_a_word_on_their_health_are_probed() -> None:
    indexed = Fleet.of([view(A, health=Health.READY), view(B)])
    fleet = merged(indexed, {C: view(C)}, {}, NOBODY)
    assert needing_probes(fleet, indexed) == (B, C)
