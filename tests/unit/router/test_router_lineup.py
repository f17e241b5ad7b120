"""A state is made anew when it has to be, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvatlas_common.fleet import EngineView, Health, Load
from kvatlas_common.words import EngineId
from kvatlas_router.core.candidates import EngineState
from kvatlas_router.core.cost import Ahead
from kvatlas_router.core.lineup import NO_LOAD, STATE_S, Lineup

A, B, C = (EngineView(EngineId(f"{name}:1"), f"http://{name}:1", health=Health.READY) for name in "abc")


class Made:
    """A lineup, and the engines whose states were made since it was last asked."""

    def __init__(self) -> None:
        self.lineup = Lineup(self._make)
        self._made: list[tuple[EngineView, Load]] = []

    def _make(self, view: EngineView, load: Load, now: float) -> EngineState:
        self._made.append((view, load))
        return EngineState.of(view, Ahead(load.running))

    def at(self, now: float, *views: EngineView, **loads: Load) -> list[tuple[EngineView, Load]]:
        line = self.lineup.of(views, {EngineId(f"{name}:1"): load for name, load in loads.items()}, now)
        assert [state.view for state in line.states] == list(views)
        assert line.places == {view.id: place for place, view in enumerate(views)}
        made, self._made = self._made, []
        return made


@pytest.fixture
def made() -> Made:
    made = Made()
    assert made.at(1.0, A, B) == [(A, NO_LOAD), (B, NO_LOAD)]
    return made


def test_a_state_is_used_for_a_while(made: Made) -> None:
    assert made.at(1.0 + STATE_S / 2, A, B) == []
    assert made.at(1.0 + STATE_S, A, B) == [(A, NO_LOAD), (B, NO_LOAD)]


def test_where_something_happened_it_is_made_anew_once(made: Made) -> None:
    made.lineup.changed(B.id)
    made.lineup.changed(C.id)
    assert made.at(1.0, A, B) == [(B, NO_LOAD)]
    assert made.at(1.0, A, B) == []


def test_another_load_and_none_any_more(made: Made) -> None:
    load = Load(running=3)
    assert made.at(1.0, A, B, a=load) == [(A, load)]
    assert made.at(1.0, A, B, a=load) == []
    assert made.at(1.0, A, B) == [(A, NO_LOAD)]


def test_another_view(made: Made) -> None:
    other = replace(A, block_size=16)
    assert made.at(1.0, other, B) == [(other, NO_LOAD)]
    assert made.at(1.0, B, other) == []


def test_fleets_asked_for_in_turns_keep_their_states(made: Made) -> None:
    assert made.at(1.0, C) == [(C, NO_LOAD)]
    made.lineup.changed(A.id)
    assert made.at(1.0, C, B) == []
    assert made.at(1.0, A, C) == [(A, NO_LOAD)]
    assert made.at(1.0, B) == []


def test_what_was_given_out_stays_as_it_was(made: Made) -> None:
    line = made.lineup.of((A, B), {}, 1.0)
    before = list(line.states)
    made.lineup.changed(A.id)
    made.at(1.0, A, B)
    assert list(map(id, line.states)) == list(map(id, before))


def test_cleared_all_are_made_anew(made: Made) -> None:
    made.lineup.clear()
    assert made.at(1.0, A, B) == [(A, NO_LOAD), (B, NO_LOAD)]
    assert made.lineup.of((), {}, 1.0).states == []
