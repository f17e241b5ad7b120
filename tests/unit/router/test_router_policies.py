"""Every policy's rule, and costs against a plain search."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.candidates import Candidate, Candidates, EngineState, Standing
from kvatlas_router.core.choice import Choice, NoEngine, Strategy
from kvatlas_router.core.cost import Ahead, Quote
from kvatlas_router.core.outliers import Trust
from kvatlas_router.core.plans import Plan
from kvatlas_router.core.policies import PolicyName, Situation, policy
from kvatlas_router.core.policies.by_cost import ALIKE
from kvatlas_router.core.policies.by_hash import rendezvous
from kvatlas_router.core.rates import PRIOR

CHANCE = random.Random(5).random
ANSWER_TOKENS = 500.0


def view(number: int, health: Health = Health.READY) -> EngineView:
    return EngineView(EngineId(f"10.0.0.{number}:8000"), f"http://10.0.0.{number}:8000", health=health, block_size=64)


def holding(number: int, blocks: int = 0, **also: object) -> Candidate:
    match = EngineMatch(view(number).id, blocks, {Medium.GPU: blocks}, True) if blocks else None
    return with_(Candidate(EngineState.of(view(number)), match, True, 64), **also)


def bare(number: int, health: Health = Health.READY, known: bool = False, **also: object) -> Candidate:
    """Nothing is known of it."""
    return with_(Candidate(EngineState.of(view(number, health)), known=known, block_size=64), **also)


def with_(candidate: Candidate, **also: Any) -> Candidate:
    """Fields of the candidate, of its state, or of what is ahead there."""

    def of(named: type[NamedTuple]) -> Any:
        return {n: v for n, v in also.items() if n in named._fields}

    before = candidate.state
    ahead = before.ahead._replace(**of(Ahead))
    quote = Quote(PRIOR, ahead, ANSWER_TOKENS, share=also.get("share", before.share))
    own = {"last_used": before.last_used} | {n: also[n] for n in ("last_used", "trust") if n in also}
    state = EngineState.of(before.view, ahead, quote, **own)
    return candidate._replace(state=state, **of(Candidate))


def choose(
    name: PolicyName,
    candidates: list[Candidate],
    tokens: int = 400,
    *,
    chance: Callable[[], float] = CHANCE,
    temperature_ms: float = 0.0,
    **ask: object,
) -> Choice:
    asked = replace(Ask("m", tokens), **ask)  # type: ignore[arg-type]
    situation = Situation(asked, Candidates.of(candidates), None, chance)
    choice = policy(name, temperature_ms=temperature_ms).choose(situation)
    assert choice is not None
    return choice


def numbers(choice: Choice) -> list[str]:
    return [t.engine.address[7:].partition(":")[0] for t in choice.terms]


candidates = st.lists(
    st.builds(
        lambda number, health, blocks, known, queued, used, trust, share: Candidate(
            EngineState.of(view(number, health), Ahead(queued), Quote(PRIOR, Ahead(queued), share=share), used, trust),
            EngineMatch(view(number).id, blocks, {Medium.GPU: blocks}, True) if blocks and known else None,
            known,
            64,
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
    if not any(c.known for c in found):
        asked = Situation(Ask("m", tokens), Candidates.of(found), None, lambda: 0.5)
        assert policy(PolicyName.PRECISE).choose(asked) is None
        return
    if not usable:
        with pytest.raises(NoEngine):
            choose(PolicyName.PRECISE, found, tokens)
        return
    choice = choose(PolicyName.PRECISE, found, tokens)
    assert {t.engine for t in choice.terms} == {c.view.id for c in usable}
    share = {c.view.id: c.state.share for c in found}
    costs = {t.engine: t.cost.total_ms / share[t.engine] for t in choice.terms}
    step = max(min(costs.values()) * ALIKE, 1.0)
    worth = {t.engine: (t.state.standing, round(costs[t.engine] / step)) for t in choice.terms}
    used = {c.view.id: c.state.last_used for c in found}
    assert choice.engine.id == min(worth, key=lambda e: (*worth[e], used[e], [c.view.id for c in found].index(e)))


def test_a_longer_match_is_cheaper_and_the_prediction_is_its_tokens() -> None:
    choice = choose(PolicyName.PRECISE, [holding(1, 30), holding(2, 50), holding(3)], 4000)
    assert numbers(choice) == ["2", "1", "3"]
    assert [t.cached_tokens for t in choice.terms] == [3200, 1920, 0]
    assert [t.to_compute for t in choice.terms] == [800, 2080, 4000]
    assert str(choice.reason) == "precise"


def test_an_engine_with_the_prefix_loses_exactly_when_another_is_faster() -> None:
    """Waiting for `queued` tokens against computing 3,200 more: whichever takes less time to the first token."""
    for queued in range(0, 8000, 250):
        holder, empty = holding(1, 50, queued_tokens=queued), holding(2)
        choice = choose(PolicyName.PRECISE, [holder, empty], 4000)
        least = min(term.cost.total_ms for term in choice.terms)
        assert choice.terms[0].cost.total_ms <= least * (1 + ALIKE) + 1
        if queued < 3000:
            assert choice.engine == holder.view
        if queued > 5000:
            assert choice.engine == empty.view


def test_a_hot_prefix_spreads_when_its_engine_is_busy() -> None:
    idle, busy = holding(2), holding(1, 90, decoding=10)
    assert choose(PolicyName.PRECISE, [busy, idle], 6000).engine == busy.view
    assert choose(PolicyName.PRECISE, [with_(busy, decoding=900), idle], 6000).engine == idle.view


def test_blocks_on_a_slower_medium_cost_their_transfer() -> None:
    far = EngineMatch(view(1).id, 50, {Medium.GPU: 10, Medium.STORAGE: 40}, True)
    choice = choose(
        PolicyName.PRECISE, [Candidate(EngineState.of(view(1)), far, True, 64), holding(2, 50), holding(3)], 4000
    )
    assert numbers(choice) == ["2", "1", "3"]
    assert choice.terms[1].transferred == ((Medium.STORAGE, 2560),)
    assert choice.terms[1].cost.transfer_ms > 0 == choice.terms[0].cost.transfer_ms


def test_what_is_being_computed_there_counts_as_held_but_is_not_predicted() -> None:
    choice = choose(PolicyName.PRECISE, [holding(1, 10, expected_blocks=50), holding(2, 20)], 4000)
    assert numbers(choice) == ["1", "2"]
    assert (choice.terms[0].cached_tokens, choice.terms[0].to_compute) == (640, 800)


def test_an_engine_that_is_late_costs_that_much_more() -> None:
    choice = choose(PolicyName.PRECISE, [holding(1, late_s=3.0), holding(2)])
    assert numbers(choice) == ["2", "1"]
    assert choice.terms[1].cost.queue_ms == pytest.approx(3000)


def test_a_tie_goes_to_the_least_recently_used() -> None:
    fleet = [holding(1, 2, last_used=9.0), holding(2, 2, last_used=3.0), holding(3, 2, last_used=5.0)]
    assert numbers(choose(PolicyName.PRECISE, fleet)) == ["2", "3", "1"]


def test_an_engine_that_failed_goes_last_and_one_that_is_down_not_at_all() -> None:
    fleet = [
        holding(4, 9, trust=Trust.EJECTED),
        holding(1, 9, trust=Trust.SUSPECT),
        bare(2, Health.UNKNOWN, known=True),
        bare(3, Health.DOWN),
    ]
    standings = [t.state.standing for t in choose(PolicyName.PRECISE, fleet).terms]
    assert standings == [Standing.UNKNOWN, Standing.SUSPECT, Standing.EJECTED]


def test_an_engine_that_starts_slowly_gets_what_only_it_holds_and_little_else() -> None:
    new = holding(1, share=0.1)
    assert choose(PolicyName.PRECISE, [new, holding(2, queued_tokens=3000)]).engine == view(2)
    assert choose(PolicyName.PRECISE, [new, holding(2, queued_tokens=9000)]).engine == view(1)
    assert choose(PolicyName.PRECISE, [holding(1, 90, share=0.1), holding(2)], 6000).engine == view(1)
    assert choose(PolicyName.LEAST_LOAD, [new, holding(2, decoding=3)]).engine == view(2)


def test_unknown_is_not_empty() -> None:
    choice = choose(PolicyName.PRECISE, [holding(1), bare(2)])
    assert {t.engine.address: t.cached_tokens for t in choice.terms} == {"10.0.0.1:8000": 0, "10.0.0.2:8000": None}


def test_a_prediction_never_exceeds_the_prompt() -> None:
    assert choose(PolicyName.PRECISE, [holding(1, 20)], 100).terms[0].cached_tokens == 100


def test_temperature_explores_and_prefers_the_better() -> None:
    fleet = [holding(1, 60), holding(2)]
    drawn = random.Random(3)
    seen = Counter(
        numbers(choose(PolicyName.PRECISE, fleet, 4000, chance=drawn.random, temperature_ms=300))[0] for _ in range(400)
    )
    assert 20 < seen["2"] < 180
    cold = [numbers(choose(PolicyName.PRECISE, fleet, 4000, chance=drawn.random))[0] for _ in range(20)]
    assert set(cold) == {"1"}


@given(st.binary(min_size=1, max_size=40), st.integers(2, 12))
def test_when_an_engine_leaves_only_its_own_sessions_move(session: bytes, engines: int) -> None:
    fleet = [bare(n) for n in range(1, engines + 1)]
    first = choose(PolicyName.SESSION, fleet, session=session)
    again = choose(PolicyName.SESSION, list(reversed(fleet)), session=session)
    assert [t.engine for t in first.terms] == [t.engine for t in again.terms]
    left = [c for c in fleet if c.view.id != first.terms[1].engine]
    assert choose(PolicyName.SESSION, left, session=session).engine == first.engine
    without = [c for c in fleet if c.view.id != first.engine.id]
    assert choose(PolicyName.SESSION, without, session=session).engine.id == first.terms[1].engine


def test_sessions_spread_evenly() -> None:
    ids = [view(n).id for n in range(1, 5)]
    homes = [max(ids, key=lambda e: rendezvous(b"session %d" % n, e)) for n in range(2000)]
    assert all(400 < homes.count(e) < 600 for e in ids)


@pytest.mark.parametrize("name", [PolicyName.SESSION, PolicyName.CONSISTENT_HASH])
def test_what_everybody_shares_does_not_bury_an_engine(name: PolicyName) -> None:
    """Each of 100 simultaneous requests of one session goes where the rule says; none gets more than its share."""
    loads = dict.fromkeys(range(1, 5), 0)
    for _ in range(100):
        fleet = [bare(n, decoding=loads[n]) for n in loads]
        loads[int(numbers(choose(name, fleet, session=b"the same", prefix=b"the same"))[0])] += 1
    assert max(loads.values()) <= 1.25 * 25 + 5


def test_hashing_goes_by_how_the_prompt_begins_and_sessions_by_their_name() -> None:
    fleet = [bare(n) for n in range(1, 9)]
    by_prefix = {
        numbers(choose(PolicyName.CONSISTENT_HASH, fleet, session=b"%d" % n, prefix=b"p"))[0] for n in range(9)
    }
    by_name = {numbers(choose(PolicyName.SESSION, fleet, session=b"s", prefix=b"%d" % n))[0] for n in range(9)}
    assert (len(by_prefix), len(by_name)) == (1, 1)


def test_what_keeps_the_response_goes_first_whatever_its_load() -> None:
    fleet = [bare(n, decoding=1000 if n == 3 else 0) for n in range(1, 5)]
    choice = choose(PolicyName.SESSION, fleet, session=b"s", home=view(3).id)
    assert (choice.engine, choice.reason.strategy) == (view(3), Strategy.AFFINITY)


def test_load_takes_the_fewest_requests_then_the_least_queued() -> None:
    fleet = [
        bare(1, decoding=1, queued_tokens=10),
        bare(2, pending=2),
        bare(3, decoding=1),
    ]
    assert numbers(choose(PolicyName.LEAST_LOAD, fleet)) == ["3", "1", "2"]


def test_of_two_at_random_the_less_loaded_and_never_the_worst_of_all() -> None:
    fleet = [bare(n, decoding=n) for n in range(1, 6)]
    firsts = Counter(numbers(choose(PolicyName.POWER_OF_TWO, fleet))[0] for _ in range(500))
    assert firsts["5"] == 0
    assert firsts["1"] > firsts["2"] > firsts["3"] > firsts["4"] > 0


def test_turns_go_round() -> None:
    fleet = [bare(n) for n in (1, 2, 3)]
    turning = policy(PolicyName.ROUND_ROBIN)
    situation = Situation(Ask("m", 5), Candidates.of(fleet), None, lambda: 0.5)
    chosen = [turning.choose(situation) for _ in range(6)]
    assert [numbers(c)[0] for c in chosen if c] == ["1", "2", "3", "1", "2", "3"]


def test_chance_is_repeatable_and_fair() -> None:
    fleet = [bare(n) for n in (1, 2, 3)]
    one, other = random.Random(7), random.Random(7)
    first = [numbers(choose(PolicyName.RANDOM, fleet, chance=one.random))[0] for _ in range(900)]
    assert first == [numbers(choose(PolicyName.RANDOM, fleet, chance=other.random))[0] for _ in range(900)]
    assert all(230 < first.count(n) < 370 for n in "123")


@pytest.mark.parametrize("name", PolicyName)
def test_every_plan_ends_with_an_answer(name: PolicyName) -> None:
    situation = Situation(Ask("m", 100), Candidates.of([bare(1)]), "why", lambda: 0.5)
    answers = [each.choose(situation) for each in Plan.of(name).policies]
    assert answers[-1] is not None
    assert [a.reason.cause for a in answers if a] == ["why"] * len([a for a in answers if a])
