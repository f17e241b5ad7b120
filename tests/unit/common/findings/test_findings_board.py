"""Findings appear, last, and clear; against a naive book of what was held and noted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.findings import Board, Code, Finding, Found, Severity
from kvatlas_common.findings.vocabulary import NOTED, PASSING

SEED = Finding(Code.SEED_DIFFERS, "another seed", "a cause", "a change")
CLAIM = Finding(Code.NAME_CLAIMED_TWICE, "one name, two engines")


def test_what_a_look_no_longer_shows_is_over() -> None:
    board = Board()
    assert [f.about for f in board.hold([("a:1", SEED), ("b:1", SEED)], 10).appeared] == ["a:1", "b:1"]
    again = board.hold([("a:1", SEED)], 20)
    assert ([f.about for f in again.appeared], [f.about for f in again.cleared]) == ([], ["b:1"])
    assert board.current(20) == (Found("a:1", SEED, 10),)
    assert board.counts(20) == {Code.SEED_DIFFERS: 1}


def test_what_happens_holds_for_a_while_after_it_happened_last() -> None:
    board = Board(noted_s=60)
    board.note("a:1", CLAIM, 0)
    board.note("a:1", CLAIM, 50)
    assert board.current(110) == (Found("a:1", CLAIM, 0),)
    assert board.current(111) == ()


def test_what_passes_and_what_a_look_will_say_is_not_kept() -> None:
    board = Board()
    board.note("a:1", Finding(Code.RESTART, "it has restarted"), 0)
    board.note("a:1", SEED, 0)
    assert board.current(0) == ()


def test_the_worst_comes_first() -> None:
    board = Board()
    codes = [Code.REPLAY_ABSENT, Code.SEED_DIFFERS, Code.ZERO_HITS]
    board.hold([("a:1", Finding(code, "")) for code in codes], 0)
    severities = [f.finding.severity for f in board.current(0)]
    assert severities == [Severity.ERROR, Severity.WARNING, Severity.ADVICE]


def test_beyond_its_bound_what_is_new_is_left_out_and_counted() -> None:
    board = Board(found_max=2)
    board.hold([(f"{n}:1", SEED) for n in range(5)], 0)
    board.note("9:1", CLAIM, 0)
    assert (len(board.current(0)), board.left_out) == (2, 4)


@given(st.sampled_from(list(Code)), st.text(), st.text(), st.floats(0, 1e9))
def test_json_is_read_as_it_was_written(code: Code, about: str, text: str, since: float) -> None:
    found = Found(about, Finding(code, text, text, text), round(since, 3))
    assert Found.of_json(json.loads(json.dumps(found.as_json()))) == found


abouts = st.sampled_from(["a", "b", "c"])
looks = st.tuples(st.just("hold"), st.lists(st.tuples(abouts, st.sampled_from([SEED, CLAIM])), max_size=4))
notes = st.tuples(st.just("note"), st.tuples(abouts, st.just(CLAIM)))


@given(st.lists(st.tuples(st.integers(0, 40), st.one_of(looks, notes)), max_size=20))
def test_as_a_naive_book_has_it(steps: list[tuple[int, tuple[str, object]]]) -> None:
    board, now = Board(noted_s=60), 0
    held: set[tuple[str, Code]] = set()
    noted: dict[tuple[str, Code], int] = {}
    for pause, (kind, what) in steps:
        now += pause
        if kind == "hold":
            assert isinstance(what, list)
            board.hold(what, now)
            held = {(about, finding.code) for about, finding in what}
        else:
            assert isinstance(what, tuple)
            about, finding = what
            board.note(about, finding, now)
            noted[about, CLAIM.code] = now
        expected = held | {key for key, at in noted.items() if now - at <= 60}
        assert {(f.about, f.finding.code) for f in board.current(now)} == expected


@pytest.mark.parametrize("code", Code)
def test_every_code_has_one_way_to_be_kept(code: Code) -> None:
    assert not (code in NOTED and code in PASSING)
    assert code.severity in Severity
