"""The comparison tells what differs, and what explains it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.live.comparison import Exchange, compare, table


def exchange(number: int, **said: Any) -> Exchange:
    """One second long, one after the other, predicted as it was, unless said otherwise."""
    fields: dict[str, Any] = {
        "kind": "chat", "streamed": False, "conversation": None, "turn": 0, "status": 200, "engine": "a:1",
        "reason": "precise", "predicted": 64, "actual": 64, "prompt_tokens": 100,
        "sent_s": float(10 * number), "done_s": float(10 * number + 1),
    }  # fmt: skip
    return Exchange(number=number, **(fields | said))


def test_equal_predictions_are_exact() -> None:
    report = compare([exchange(0), exchange(1)])
    assert (report.strict, report.strict_equal, report.exact_share, report.differences) == (2, 2, 1.0, ())


def test_a_difference_alone_at_its_engine_is_unexplained() -> None:
    report = compare([exchange(0), exchange(1, predicted=0)])
    assert [d.exchange.number for d in report.unexplained] == [1]
    assert "UNEXPLAINED" in str(report.unexplained[0])
    assert "9000 ms after the last answer" in str(report.unexplained[0])
    assert report.exact_share == 0.5


def test_a_neighbour_in_flight_at_the_same_engine_explains() -> None:
    report = compare([exchange(0), exchange(1, sent_s=0.5, predicted=0)])
    assert not report.unexplained
    assert "in flight there at once with #0" in str(report.differences[0])
    assert (report.strict, report.loose, report.loose_equal) == (0, 2, 1)


def test_more_cached_right_after_an_answer_is_events_under_way() -> None:
    more = exchange(1, sent_s=1.01, done_s=2.0, actual=128)
    less = exchange(2, sent_s=2.01, done_s=3.0, actual=0)
    report = compare([exchange(0), more, less])
    assert "sent 10 ms after the last answer there, events under way" in str(report.differences[0])
    assert [d.exchange.number for d in report.unexplained] == [2]


def test_a_neighbour_at_another_engine_does_not() -> None:
    report = compare([exchange(0, engine="b:1"), exchange(1, sent_s=0.5, predicted=0)])
    assert len(report.unexplained) == 1


@pytest.mark.parametrize("said", [{"predicted": None}, {"actual": None}])
def test_what_one_side_does_not_say_is_not_compared(said: dict[str, Any]) -> None:
    report = compare([exchange(0, **said)])
    assert (report.incomparable, report.strict) == (1, 0)


def test_failures_are_kept() -> None:
    failed = exchange(0, status=503, engine=None, predicted=None, actual=None)
    assert compare([failed, exchange(1)]).failed == (failed,)


def test_follow_ups_are_looked_for_where_the_turn_before_was() -> None:
    first = exchange(0, conversation=7)
    home = exchange(1, conversation=7, turn=1)
    away = exchange(2, conversation=7, turn=2, engine="b:1")
    other = exchange(3, conversation=8)
    report = compare([first, home, away, other])
    assert (report.homes, report.homes_found) == (2, 1)
    assert str(report.strayed[0]).startswith("#2 (turn 2 of conversation 7) went to b:1, its home is a:1 (#1, ")


def test_the_table_has_a_column_per_configuration() -> None:
    reports = {"one": compare([exchange(0)]), "another": compare([exchange(0, predicted=0)])}
    lines = table(reports, {"one": {"tokenised local": 3}, "another": {"tokenised local": 4.5}}).splitlines()
    assert lines[0].split() == ["one", "another"]
    assert [line.split()[-2:] for line in lines if line.startswith(("exact share", "tokenised"))] == [
        ["100.00%", "0.00%"],
        ["3", "4.5"],
    ]
    assert len({len(line) for line in lines}) == 1
