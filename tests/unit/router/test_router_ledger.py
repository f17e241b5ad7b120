"""The books: everything entered leaves exactly once, whatever ends a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import EngineId
from kvatlas_router.core.ledger import Ledger, Ticket

A, B = EngineId("a:1"), EngineId("b:1")


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 999), st.sampled_from("nsce")), max_size=30))
def test_the_books_balance(steps: list[tuple[EngineId, int, str]]) -> None:
    """n: still queued; s: started; c: closed; e: started, closed and closed again."""
    ledger = Ledger()
    queued, flying, unanswered = {A: 0, B: 0}, {A: 0, B: 0}, {A: 0, B: 0}
    for engine, tokens, fate in steps:
        ticket = ledger.enter(engine, tokens, 1.0)
        if fate in "se":
            ticket.started()
        if fate in "ce":
            ticket.close()
        if fate == "e":
            ticket.close()
        queued[engine] += tokens if fate == "n" else 0
        flying[engine] += fate in "ns"
        unanswered[engine] += fate == "n"
    assert {e: ledger.queued_tokens(e) for e in (A, B)} == queued
    assert {e: ledger.in_flight(e) for e in (A, B)} == flying
    assert {e: ledger.unanswered(e) for e in (A, B)} == unanswered


def test_an_error_takes_the_request_off_the_books() -> None:
    ledger = Ledger()

    def fail() -> None:
        with ledger.enter(A, 100, 1.0):
            assert ledger.queued_tokens(A) == 100
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (ledger.queued_tokens(A), ledger.in_flight(A), ledger.last_used(A)) == (0, 0, 1.0)


def test_engines_that_left_are_forgotten_when_nothing_is_in_flight_there() -> None:
    ledger = Ledger()
    ticket: Ticket = ledger.enter(A, 5, 1.0)
    ledger.enter(B, 5, 1.0).close()
    ledger.keep_only(())
    assert len(ledger) == 1
    ticket.close()
    ledger.keep_only(())
    assert len(ledger) == 0
    assert ledger.queued_tokens(A) == 0
