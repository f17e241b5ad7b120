"""The routing history against one that keeps everything in a list."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.history import ESTIMATE_PROFILE, RoutingHistory
from kvatlas_common.words import KEY_MASK, EngineId

E1, E2 = EngineId("a:1"), EngineId("b:1")


class Naive:
    """(key, when) of each engine, the longest ago first."""

    def __init__(self, lifetime_s: float, blocks_max: int) -> None:
        self.lifetime_s, self.blocks_max = lifetime_s, blocks_max
        self.held: dict[EngineId, list[tuple[int, float]]] = {}

    def note(self, engine: EngineId, keys: list[int], now: float, capacity: int | None) -> None:
        most = self.blocks_max if capacity is None else capacity
        kept = [entry for entry in self.held.get(engine, []) if entry[0] not in keys[:most]]
        kept += [(key, now) for key in keys[:most][::-1]]
        self.held[engine] = kept[max(len(kept) - most, 0) :]

    def leading(self, keys: list[int], now: float) -> dict[EngineId, int]:
        found = {}
        for engine, held in self.held.items():
            live = {key for key, when in held if when >= now - self.lifetime_s}
            number = next((i for i, key in enumerate(keys) if key not in live), len(keys))
            if number:
                found[engine] = number
        return found

    def forget(self, engine: EngineId) -> None:
        self.held.pop(engine, None)


def prompt(branches: list[int]) -> list[int]:
    """Keys that chain, as real ones do: a key says everything before it."""
    keys, key = [], 0
    for branch in branches:
        key = key * 3 + branch + 1
        keys.append(key)
    return keys


prompts = st.lists(st.integers(0, 1), max_size=8).map(prompt)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("note"), st.sampled_from([E1, E2]), prompts, st.none() | st.integers(0, 12)),
        st.tuples(st.just("forget"), st.sampled_from([E1, E2])),
        st.tuples(st.just("wait"), st.floats(0, 6)),
        st.tuples(st.just("ask"), prompts),
    ),
    max_size=40,
)


@given(steps)
def test_it_answers_as_a_list_of_everything_does(run: list[tuple[object, ...]]) -> None:
    history, naive, now = RoutingHistory(lifetime_s=10, blocks_max=20), Naive(10, 20), 100.0
    for step in run:
        match step:
            case ("note", EngineId() as engine, list(keys), None | int() as capacity):
                history.note(engine, keys, now, capacity)
                naive.note(engine, keys, now, capacity)
            case ("forget", EngineId() as engine):
                history.forget(engine)
                naive.forget(engine)
            case ("wait", float(seconds)):
                now += seconds
            case ("ask", list(keys)):
                assert history.leading(keys, now) == naive.leading(keys, now)


def test_a_full_engine_loses_the_tail_of_what_it_was_sent_longest_ago() -> None:
    history = RoutingHistory(lifetime_s=60, blocks_max=6)
    history.note(E1, [1, 2, 3, 4], now=0)
    history.note(E1, [1, 12, 13], now=1)
    history.note(E1, [1, 22], now=2)
    assert history.leading([1, 2, 3, 4], now=2) == {E1: 3}
    assert history.leading([1, 12, 13], now=2) == {E1: 3}


def test_a_prompt_longer_than_the_engine_keeps_its_beginning() -> None:
    history = RoutingHistory(lifetime_s=60, blocks_max=100)
    history.note(E1, [1, 2, 3], now=0, capacity=2)
    assert (history.leading([1, 2, 3], now=0), len(history)) == ({E1: 2}, 2)


def test_what_was_sent_a_lifetime_ago_is_gone() -> None:
    history = RoutingHistory(lifetime_s=60, blocks_max=100)
    history.note(E1, [1, 2], now=0)
    history.note(E1, [1], now=50)
    assert history.leading([1, 2], now=60) == {E1: 2}
    assert history.leading([1, 2], now=61) == {E1: 1}
    assert (history.leading([1, 2], now=111), len(history)) == ({}, 0)


def test_a_clock_that_goes_back_brings_nothing_back() -> None:
    history = RoutingHistory(lifetime_s=60, blocks_max=100)
    history.note(E1, [1], now=100)
    history.note(E1, [2], now=10)
    assert history.leading([2], now=150) == {E1: 1}


def test_keys_may_come_as_an_array() -> None:
    history = RoutingHistory(lifetime_s=60, blocks_max=100)
    history.note(E1, np.array([1, 2, KEY_MASK], dtype=np.uint64), now=0)  # type: ignore[arg-type]
    assert history.leading([1, 2, KEY_MASK], now=0) == {E1: 3}
    assert history.leading(np.array([1, 2, 3], dtype=np.uint64), now=0) == {E1: 2}


def test_a_conversation_takes_one_run_however_many_turns_it_has() -> None:
    history = RoutingHistory(lifetime_s=600, blocks_max=1000)
    for turn in range(1, 50):
        history.note(E1, list(range(1, turn * 10)), now=turn)
    assert len(history._engines[E1]._runs) == 1
    history.note(E1, [*range(1, 101), 7001], now=50)
    assert len(history._engines[E1]._runs) == 3
    assert history.leading(list(range(1, 490)), now=50) == {E1: 489}
    assert history.leading([*range(1, 101), 7001, 7002], now=50) == {E1: 101}


def test_the_estimate_profile_travels_by_its_name() -> None:
    assert HashProfile.parse(ESTIMATE_PROFILE.name) == ESTIMATE_PROFILE
