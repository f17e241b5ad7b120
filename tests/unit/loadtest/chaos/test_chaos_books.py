"""What became of requests: whole, cut or failed, and what they come to together."""

from __future__ import annotations

import json
import math
from itertools import islice
from typing import Any

import pytest

from kvatlas_loadtest.chaos.books import Exchange, Figures, cached_over_time
from kvatlas_loadtest.chaos.load import Shape, bodies, warm_up_bodies

PIECE = {"choices": [{"delta": {"content": "a"}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 80}}}
DONE = b"data: [DONE]\n"
HEADERS = {"x-kvatlas-engine": "e:1", "x-kvatlas-reason": "precise"}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n"


def exchange(*lines: bytes, begun: float = 0.0, reason: str = "precise") -> Exchange:
    made = Exchange(begun)
    made.headed(200, HEADERS | {"x-kvatlas-reason": reason})
    for number, line in enumerate(lines, 1):
        made.line(line, begun + number)
    made.ended = begun + len(lines) + 1
    return made


def test_an_answer_with_its_end_is_whole_and_says_what_was_cached() -> None:
    whole = exchange(event(PIECE), b"\n", event(USAGE), DONE, event({"error": "too late"}))
    assert whole.whole
    assert (whole.cached_tokens, whole.prompt_tokens, whole.first_at, whole.engine) == (80, 100, 1.0, "e:1")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([event(PIECE), event({"error": {"message": "lost"}})], "cut"),
        ([event(PIECE), b'data: {"choi'], "cut"),
        ([event(PIECE)], "cut"),
        ([event({"error": {"message": "none"}})], "failed"),
        ([], "failed"),
    ],
)
def test_an_answer_that_had_begun_is_cut_and_one_that_had_not_has_failed(lines: list[bytes], what: str) -> None:
    made = exchange(*lines)
    assert (made.whole, made.cut, made.failed) == (False, what == "cut", what == "failed")


def test_a_connection_that_breaks_after_the_end_changes_nothing() -> None:
    whole = exchange(event(PIECE), DONE)
    whole.broken("reset")
    assert whole.whole
    begun = exchange(event(PIECE))
    begun.broken("reset")
    assert begun.cut


def test_a_refusal_fails() -> None:
    made = Exchange(0.0)
    made.headed(503, {})
    made.error = "status 503: no engine"
    assert made.failed
    assert Figures.of([made]).failures == {"status 503: no engine": 1}


def test_figures_count_each_outcome_and_weigh_cached_tokens() -> None:
    small = {"choices": [], "usage": {"prompt_tokens": 300, "prompt_tokens_details": {"cached_tokens": 20}}}
    some = [
        exchange(event(PIECE), event(USAGE), DONE),
        exchange(event(PIECE), event(small), DONE, reason="affinity:deadline"),
        exchange(event(PIECE)),
        exchange(),
    ]
    some[0].retried = 2
    figures = Figures.of(some)
    assert (figures.requests, figures.failed, figures.cut, figures.retried) == (4, 1, 1, 1)
    assert figures.precise == 0.75
    assert figures.cached == 100 / 400
    assert figures.slowest_s == 1.0
    assert math.isnan(Figures.of([]).cached)


def test_the_cached_share_over_time_has_gaps_where_nothing_was_answered() -> None:
    some = [exchange(event(PIECE), event(USAGE), DONE, begun=at) for at in (9.0, 10.2, 12.5, 12.9)]
    assert cached_over_time(some, since=10.0) == [0.8, None, 0.8]
    assert cached_over_time([], since=10.0) == []


def test_the_load_follows_from_the_seed_and_asks_nothing_twice() -> None:
    shape = Shape(contexts=5)
    some = list(islice(bodies(shape, 1), 50))
    assert some == list(islice(bodies(shape, 1), 50))
    assert some != list(islice(bodies(shape, 2), 50))
    systems = {body["messages"][0]["content"] for body in some}
    assert len(systems) == 5
    assert len({body["messages"][1]["content"] for body in some}) == 50
    assert {body["messages"][0]["content"] for body in warm_up_bodies(shape, 1)} == systems
    assert len(warm_up_bodies(shape, 1)) == 5
