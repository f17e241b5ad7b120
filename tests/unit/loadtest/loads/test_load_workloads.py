"""The loads: they follow from their seed, and are what they say they are."""

from __future__ import annotations

from collections import Counter

import pytest

from kvatlas_loadtest.loads.arrivals import Answer, Arrival, BadLoad, Segment, checked, prompt_tokens
from kvatlas_loadtest.loads.workloads import LADDER, REFERENCE_ANSWER, WORKLOADS, reference, workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_load_follows_from_its_seed(name: str) -> None:
    once, again, other = (workload(name, seed, 0.1) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    checked(once)


def test_the_reference_is_the_published_one() -> None:
    arrivals = reference(1)
    assert {prompt_tokens(arrivals, index) for index in range(0, len(arrivals), 97)} == {7200}
    assert {arrival.output_tokens for arrival in arrivals} == {REFERENCE_ANSWER}
    assert len({arrival.prompt for arrival in arrivals}) == 750
    asked = Counter(arrival.stage for arrival in arrivals)
    assert [asked[stage] for stage in sorted(asked)] == [750, *(rate * seconds for rate, seconds in LADDER)]


def test_a_scale_keeps_whole_stages_and_the_last() -> None:
    asked = Counter(arrival.stage for arrival in reference(1, 0.2))
    assert len(asked) == 1 + 3
    assert asked[max(asked)] == 60 * 25


def test_turns_of_a_conversation_follow_each_other() -> None:
    arrivals = workload("agents", 1, 0.1)
    turns = [arrival for arrival in arrivals if arrival.after is not None]
    assert turns
    for arrival in turns:
        assert arrival.after is not None
        before = arrivals[arrival.after]
        assert arrival.prompt[: len(before.prompt)] == before.prompt
        assert arrival.prompt[len(before.prompt)] == Answer(arrival.after)


def test_an_unknown_load_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="reference"):
        workload("refrence", 1)


@pytest.mark.parametrize(
    ("arrivals", "why"),
    [
        ([Arrival(0.0, (Segment(1, 5), Answer(0)), 1, after=0)], "not an earlier one"),
        ([Arrival(0.0, (Segment(1, 5),), 1), Arrival(0.0, (Answer(0),), 1)], "not after which"),
        ([Arrival(0.0, (), 1)], "no prompt"),
        ([Arrival(0.0, (Segment(1, 5),), 1), Arrival(0.0, (Segment(1, 5),), 1, after=0, stage=1)], "another stage"),
        ([Arrival(0.0, (Segment(1, 5),), 1, stage=1), Arrival(0.0, (Segment(1, 5),), 1)], "a later stage"),
    ],
)
def test_a_load_that_cannot_be_sent_is_refused(arrivals: list[Arrival], why: str) -> None:
    with pytest.raises(BadLoad, match=why):
        checked(arrivals)
