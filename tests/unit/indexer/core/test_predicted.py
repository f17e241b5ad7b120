"""Blocks that are expected, against a list of requests; when they are confirmed, dropped or given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.predicted import Predicted, PredictedLimits

E1, E2 = EngineId("a:1"), EngineId("b:1")
LIMITS = PredictedLimits(pending_s=60, confirm_s=2)


def routed(request: str, keys: list[int], engine: EngineId = E1) -> tuple[tuple[str, str], Observation, list[int]]:
    return ("r", request), Routed(request, engine, "m", 100, 0, {}), keys


def first(request: str, engine: EngineId = E1) -> tuple[tuple[str, str], Observation, list[int]]:
    return ("r", request), FirstToken(request, engine, "m", 0.1), []


def ended(
    request: str, outcome: Outcome = Outcome.OK, engine: EngineId = E1
) -> tuple[tuple[str, str], Observation, list[int]]:
    return ("r", request), Finished(request, engine, "m", None, 1, True, outcome), []


def test_a_prompt_counts_as_held_from_being_routed_until_events_had_their_time() -> None:
    it = Predicted(LIMITS)
    it.observe(*routed("x", [1, 2, 3]), 0)
    assert it.leading([1, 2, 4]) == {E1: 2}
    assert it.leading([9]) == it.leading([]) == {}
    it.on_tick(50)
    it.observe(*first("x"), 50)
    it.on_tick(52)
    assert it.leading([1, 2, 3]) == {E1: 3}
    it.on_tick(52.1)
    assert (it.leading([1, 2, 3]), len(it)) == ({}, 0)


def test_a_request_that_failed_leaves_nothing_and_one_that_was_short_has_its_time() -> None:
    it = Predicted(LIMITS)
    for request, outcome in (("x", Outcome.ERROR), ("y", Outcome.CANCELLED), ("z", Outcome.OK)):
        it.observe(*routed(request, [ord(request)]), 0)
        it.observe(*ended(request, outcome), 1)
    assert [it.leading([ord(request)]) for request in "xyz"] == [{}, {}, {E1: 1}]
    it.on_tick(3.1)
    assert it.leading([ord("z")]) == {}


def test_the_end_of_an_answer_does_not_lengthen_the_time_of_its_prompt() -> None:
    it = Predicted(LIMITS)
    it.observe(*routed("x", [1]), 0)
    it.observe(*first("x"), 1)
    it.observe(*ended("x"), 2.9)
    it.on_tick(3.1)
    assert it.leading([1]) == {}


def test_a_retry_is_expected_where_it_went() -> None:
    it = Predicted(LIMITS)
    it.observe(*routed("x", [1, 2]), 0)
    it.observe(*routed("x", [1, 2], E2), 1)
    it.observe(*first("x"), 1.5)  # of the first attempt
    assert it.leading([1, 2]) == {E2: 2}


def test_a_prefix_is_expected_while_any_of_its_requests_is() -> None:
    it = Predicted(LIMITS)
    it.observe(*routed("x", [1, 2, 3]), 0)
    it.observe(*routed("y", [1, 2, 4, 5]), 0)
    it.observe(*ended("x", Outcome.ERROR), 1)
    assert it.leading([1, 2, 3]) == {E1: 2}
    assert it.leading([1, 2, 4, 5]) == {E1: 4}


def test_one_never_begun_is_given_up_and_so_are_the_oldest_of_too_many() -> None:
    it = Predicted(PredictedLimits(pending_s=60, confirm_s=2, keys_max=4))
    it.observe(*routed("x", [1, 2]), 0)
    it.observe(*routed("y", [3, 4]), 30)
    it.observe(*routed("z", [5]), 31)
    assert (it.leading([1, 2]), it.leading([3, 4])) == ({}, {E1: 2})
    it.on_tick(90.5)
    assert (it.leading([3, 4]), it.leading([5])) == ({}, {E1: 1})


def test_a_cleared_engine_is_expected_to_hold_nothing() -> None:
    it = Predicted(LIMITS)
    it.observe(*routed("x", [1]), 0)
    it.observe(*routed("y", [1], E2), 0)
    it.observe(*first("x"), 1)
    it.forget(E1)
    assert it.leading([1]) == {E2: 1}
    it.observe(*ended("x"), 1)


prompts = st.integers(0, 3).flatmap(lambda branch: st.integers(0, 4).map(lambda n: [branch * 10 + i for i in range(n)]))
steps = st.lists(
    st.one_of(
        st.builds(routed, st.sampled_from("xyz"), prompts, st.sampled_from([E1, E2])),
        st.builds(ended, st.sampled_from("xyz"), st.just(Outcome.ERROR), st.sampled_from([E1, E2])),
    ),
    max_size=30,
)


@given(steps, prompts)
def test_it_answers_as_a_list_of_requests_does(
    run: list[tuple[tuple[str, str], Observation, list[int]]], asked: list[int]
) -> None:
    it, open_requests = Predicted(LIMITS), dict[str, tuple[EngineId, list[int]]]()
    for at, observation, keys in run:
        it.observe(at, observation, keys, 0)
        if isinstance(observation, Routed):
            open_requests[observation.request_id] = (observation.engine, keys)
        else:
            open_requests.pop(observation.request_id, None)
    found: dict[EngineId, int] = {}
    for engine, keys in open_requests.values():
        same = sum(1 for n in range(1, len(asked) + 1) if keys[:n] == asked[:n])
        found[engine] = max(found.get(engine, 0), same)
    assert it.leading(asked) == {engine: n for engine, n in found.items() if n}
