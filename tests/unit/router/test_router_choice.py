"""The choice against a naive oracle, and its rules one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.choice import (
    Candidate,
    NoEngine,
    Standing,
    Strategy,
    by_affinity,
    by_chance,
    by_cost,
    by_load,
    by_turn,
    rendezvous,
)
from kvatlas_router.core.outliers import Trust


def view(number: int, health: Health = Health.READY, block_size: int | None = 64) -> EngineView:
    return EngineView(
        EngineId(f"10.0.0.{number}:8000"), f"http://10.0.0.{number}:8000", health=health, block_size=block_size
    )


def holding(number: int, blocks: int, **also: object) -> Candidate:
    engine = view(number)
    match = EngineMatch(engine.id, blocks, {Medium.GPU: blocks}, True) if blocks else None
    return replace(Candidate(engine, match, known=True), **also)  # type: ignore[arg-type]


candidates = st.lists(
    st.builds(
        lambda number, health, blocks, known, queued, used, trust, share: Candidate(
            view(number, health),
            EngineMatch(view(number).id, blocks, {Medium.GPU: blocks}, True) if blocks else None,
            known,
            queued_tokens=queued,
            last_used=used,
            trust=trust,
            share=share,
        ),
        st.integers(1, 250),
        st.sampled_from(Health),
        st.integers(0, 20),
        st.booleans(),
        st.integers(0, 3000),
        st.integers(0, 5).map(float),
        st.sampled_from(Trust),
        st.sampled_from([0.1, 0.5, 1.0]),
    ),
    unique_by=lambda c: c.view.id,
    max_size=8,
)


@given(candidates, st.integers(1, 2000))
def test_cost_picks_what_a_plain_search_picks(found: list[Candidate], tokens: int) -> None:
    usable = [c for c in found if c.view.health is not Health.DOWN]
    if not usable:
        with pytest.raises(NoEngine):
            by_cost(found, tokens)
        return
    choice = by_cost(found, tokens)
    assert {t.engine for t in choice.terms} == {c.view.id for c in usable}
    if not any(c.known for c in found):
        assert str(choice.reason) == "load:unknown-engines"
        return

    def cost(c: Candidate) -> int:
        cached = c.match.blocks * 64 if c.known and c.match else 0
        return max(0, tokens - cached) + c.queued_tokens

    def worth(c: Candidate) -> tuple[int, float, float, str]:
        standing = 1 + c.trust if c.trust else 0 if c.view.health is Health.READY else 1
        return standing, cost(c) / c.share, c.last_used, str(c.view.id)

    best = min(usable, key=worth)
    assert choice.engine == best.view
    assert choice.cost == cost(best)


def test_a_longer_match_is_cheaper_and_the_prediction_is_its_tokens() -> None:
    choice = by_cost([holding(1, 3), holding(2, 5), holding(3, 0)], 400)
    assert choice.engine.id.address == "10.0.0.2:8000"
    assert [t.cached_tokens for t in choice.terms] == [320, 192, 0]
    assert [t.cost for t in choice.terms] == [80, 208, 400]
    assert str(choice.reason) == "precise"


def test_queued_tokens_outweigh_a_match() -> None:
    assert by_cost([holding(1, 5, queued_tokens=400), holding(2, 0)], 400).engine.id.address == "10.0.0.2:8000"


def test_a_tie_goes_to_the_least_recently_used() -> None:
    choice = by_cost([holding(1, 2, last_used=9.0), holding(2, 2, last_used=3.0), holding(3, 2, last_used=5.0)], 200)
    assert [t.engine.address[7] for t in choice.terms] == ["2", "3", "1"]


def test_an_engine_that_failed_goes_last_and_one_that_is_down_not_at_all() -> None:
    choice = by_cost(
        [
            holding(4, 9, trust=Trust.EJECTED),
            holding(1, 9, trust=Trust.SUSPECT),
            Candidate(view(2, Health.UNKNOWN), known=True),
            Candidate(view(3, Health.DOWN)),
        ],
        600,
    )
    assert [t.standing for t in choice.terms] == [Standing.UNKNOWN, Standing.SUSPECT, Standing.EJECTED]


def test_an_engine_that_starts_slowly_gets_what_only_it_holds_and_little_else() -> None:
    new = holding(1, 0, share=0.1, queued_tokens=0)
    assert by_cost([new, holding(2, 0, queued_tokens=3000)], 400).engine.id.address == "10.0.0.2:8000"
    assert by_cost([new, holding(2, 0, queued_tokens=4000)], 400).engine.id.address == "10.0.0.1:8000"
    assert by_cost([holding(1, 6, share=0.1), holding(2, 0)], 400).engine.id.address == "10.0.0.1:8000"
    assert by_load([new, holding(2, 0, in_flight=3)], 400, None).engine.id.address == "10.0.0.2:8000"


def test_unknown_is_not_empty() -> None:
    choice = by_cost([holding(1, 0), Candidate(view(2), known=False)], 100)
    assert {t.engine.address: t.cached_tokens for t in choice.terms} == {"10.0.0.1:8000": 0, "10.0.0.2:8000": None}


def test_a_prediction_never_exceeds_the_prompt() -> None:
    assert by_cost([holding(1, 20)], 100).terms[0].cached_tokens == 100


@given(st.binary(min_size=1, max_size=40), st.integers(2, 12))
def test_when_an_engine_leaves_only_its_own_sessions_move(session: bytes, engines: int) -> None:
    fleet = [Candidate(view(n)) for n in range(1, engines + 1)]
    first = by_affinity(fleet, 100, session, cause="index-unavailable")
    again = by_affinity(list(reversed(fleet)), 100, session, cause="index-unavailable")
    assert [t.engine for t in first.terms] == [t.engine for t in again.terms]
    left = [c for c in fleet if c.view.id != first.terms[1].engine]
    assert by_affinity(left, 100, session, cause="x").engine == first.engine
    without = [c for c in fleet if c.view.id != first.engine.id]
    assert by_affinity(without, 100, session, cause="x").engine.id == first.terms[1].engine


def test_sessions_spread_evenly() -> None:
    ids = [view(n).id for n in range(1, 5)]
    homes = [max(ids, key=lambda e: rendezvous(b"session %d" % n, e)) for n in range(2000)]
    assert all(400 < homes.count(e) < 600 for e in ids)


def test_a_session_everybody_shares_does_not_bury_an_engine() -> None:
    """Each of 100 simultaneous requests of one session goes where the rule says; none gets more than its share."""
    loads = dict.fromkeys(range(1, 5), 0)
    for _ in range(100):
        fleet = [Candidate(view(n), in_flight=loads[n]) for n in loads]
        chosen = by_affinity(fleet, 10, b"the same", cause="deadline").engine
        loads[int(chosen.id.address.split(":")[0].rsplit(".", 1)[1])] += 1
    assert max(loads.values()) <= 1.25 * 25 + 5


def test_what_keeps_the_response_goes_first_whatever_its_load() -> None:
    fleet = [Candidate(view(n), in_flight=1000 if n == 3 else 0) for n in range(1, 5)]
    choice = by_affinity(fleet, 10, b"s", cause="unrenderable:previous_response_id", home=view(3).id)
    assert choice.engine == view(3)
    assert str(choice.reason) == "affinity:unrenderable:previous_response_id"


def test_load_takes_the_least_queued_then_the_fewest_requests() -> None:
    fleet = [
        Candidate(view(1), queued_tokens=10),
        Candidate(view(2), in_flight=2),
        Candidate(view(3), in_flight=1),
    ]
    assert [t.engine.address[7] for t in by_load(fleet, 5, None).terms] == ["3", "2", "1"]


def test_turns_go_round() -> None:
    fleet = [Candidate(view(n)) for n in (1, 2, 3)]
    assert [by_turn(fleet, 5, n).engine.id.address[7] for n in range(6)] == ["1", "2", "3", "1", "2", "3"]


def test_chance_is_repeatable_and_fair() -> None:
    fleet = [Candidate(view(n)) for n in (1, 2, 3)]
    one, other = random.Random(7), random.Random(7)
    first = [by_chance(fleet, 5, one.random).engine.id for _ in range(900)]
    assert first == [by_chance(fleet, 5, other.random).engine.id for _ in range(900)]
    assert all(230 < first.count(c.view.id) < 370 for c in fleet)
    assert by_chance(fleet, 5, one.random).reason.strategy is Strategy.RANDOM
