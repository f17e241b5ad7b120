"""The books: everything entered leaves exactly once, whatever ends a request; and how far an engine has got."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import EngineId
from kvatlas_router.core.books import Books, Occupancy, Ticket

A, B = EngineId("a:1"), EngineId("b:1")


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 999), st.sampled_from("nsce")), max_size=30))
def test_the_books_balance(steps: list[tuple[EngineId, int, str]]) -> None:
    """n: still pending; s: started; c: closed; e: started, closed and closed again."""
    books = Books()
    queued, pending, decoding = {A: 0, B: 0}, {A: 0, B: 0}, {A: 0, B: 0}
    for engine, tokens, fate in steps:
        ticket = books.enter(engine, tokens, 1.0)
        if fate in "se":
            ticket.started(2.0)
        if fate in "ce":
            ticket.close()
        if fate == "e":
            ticket.close()
        queued[engine] += tokens if fate == "n" else 0
        pending[engine] += fate == "n"
        decoding[engine] += fate == "s"
    assert {e: books.of(e, 3.0).queued_tokens for e in (A, B)} == queued
    assert {e: books.of(e, 3.0).pending for e in (A, B)} == pending
    assert {e: books.of(e, 3.0).decoding for e in (A, B)} == decoding


def test_an_error_takes_the_request_off_the_books() -> None:
    books = Books()

    def fail() -> None:
        with books.enter(A, 100, 1.0):
            assert books.of(A, 1.0).queued_tokens == 100
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert books.of(A, 1.0) == Occupancy(last_used=1.0)


def head(books: Books) -> tuple[int, float | None]:
    occupancy = books.of(A, 20.0)
    return occupancy.head_tokens, occupancy.head_since


def test_the_oldest_prompt_is_computed_from_when_it_became_that() -> None:
    books = Books()
    first, second, third = (books.enter(A, tokens, 10.0) for tokens in (1000, 500, 200))
    assert head(books) == (1000, 10.0)
    second.started(10.5)  # it overtook the oldest
    assert head(books) == (1000, 10.0)
    first.started(11.0)
    assert head(books) == (200, 11.0)
    books.enter(A, 300, 12.0)
    third.close()  # whether it was computed, nobody knows
    assert head(books) == (300, None)


def test_how_late_the_oldest_is() -> None:
    books = Books()
    books.enter(A, 1000, 10.0, expected_s=0.5)
    assert books.of(A, 10.4).late_s == 0
    assert books.of(A, 12.5).late_s == pytest.approx(2.0)


def test_an_answer_that_does_not_stream_decodes_once_its_prompt_should_be_computed() -> None:
    books = Books()
    ticket = books.enter(A, 1000, 10.0, expected_s=0.5, streams=False)
    assert (books.of(A, 10.4).pending, books.of(A, 10.4).decoding) == (1, 0)
    assert (books.of(A, 10.6).pending, books.of(A, 10.6).decoding) == (0, 1)
    ticket.started(15.0)
    assert ticket.first_token_s is None
    ticket.close()
    assert books.of(A, 15.0).in_flight == 0


def test_who_closes_a_ticket_is_told_once_what_it_learnt() -> None:
    ended: list[Ticket] = []
    with Books().enter(A, 10, 1.0, on_end=ended.append) as ticket:
        ticket.started(1.5)
        ticket.ended(3.0, 8, 20)
    ticket.close()
    assert ended == [ticket]
    assert (ticket.first_token_s, ticket.ended_at, ticket.cached_tokens, ticket.completion_tokens) == (0.5, 3.0, 8, 20)


def test_engines_that_left_are_forgotten_when_nothing_is_in_flight_there() -> None:
    books = Books()
    ticket = books.enter(A, 5, 1.0)
    books.enter(B, 5, 1.0).close()
    books.keep_only(())
    assert len(books) == 1
    ticket.close()
    books.keep_only(())
    assert len(books) == 0
