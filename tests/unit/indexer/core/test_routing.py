"""What lookups are answered from the routers' reports: estimates, and what the index's answer gains."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas_common.fleet import EngineView, Fleet, Health, Sync
from kvatlas_common.history import ESTIMATE_PROFILE
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.observations import Finished, Outcome, Routed
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.routing import Routing

E1, E2, E3 = EngineId("a:1"), EngineId("b:1"), EngineId("c:1")
OWN, NEUTRAL = "sha256_cbor/b16/tagged/seed=42", ESTIMATE_PROFILE.name
PROMPT = {OWN: [1, 2, 3, 4, 5, 6, 7, 8], NEUTRAL: [101, 102]}


def view(engine: EngineId, **known: Any) -> EngineView:
    return EngineView(engine, f"http://{engine}", **({"models": frozenset({"m"}), "health": Health.READY} | known))


FLEET = Fleet.of(
    [
        view(E1, profile=OWN, block_size=16, sync=Sync.EXACT),
        view(E2),  # it publishes nothing
        view(E3, models=frozenset({"other"}), profile=OWN, block_size=16),
    ]
)


def sent(routing: Routing, engine: EngineId, fleet: Fleet = FLEET, request: str = "x", now: float = 0.0) -> None:
    routing.observe("r", Routed(request, engine, "m", 128, 0, PROMPT), fleet, now)


def guess(engine: EngineId, blocks: int) -> EngineMatch:
    return EngineMatch(engine, blocks, {Medium.GPU: blocks}, False, expected=blocks)


def test_an_estimate_is_of_all_engines_that_serve_the_model_each_by_the_keys_it_is_known_by() -> None:
    routing = Routing(estimate_ttl_s=600)
    for engine in (E1, E2, E3):
        sent(routing, engine)
    assert routing.estimate(FLEET, "m", PROMPT, (), 1) == MatchAnswer((guess(E1, 8), guess(E2, 2)))
    assert routing.estimate(FLEET, "m", PROMPT, [E2], 1) == MatchAnswer((guess(E2, 2),))
    begun = {OWN: [1, 2, 99], NEUTRAL: [101]}
    assert routing.estimate(FLEET, "m", begun, (), 1) == MatchAnswer((guess(E1, 2), guess(E2, 1)))
    assert routing.estimate(FLEET, "m", {OWN: [1]}, (), 1) == MatchAnswer((guess(E1, 1),), (E2,))
    assert routing.estimate(FLEET, "m", PROMPT, (), 700) == MatchAnswer()
    with pytest.raises(UnknownModel):
        routing.estimate(FLEET, "who?", PROMPT, (), 1)


def test_an_engine_keeps_no_more_than_it_can_hold() -> None:
    fleet = Fleet.of([view(E1, profile=OWN, block_size=16, kv_tokens=48), view(E2, kv_tokens=64 + 63)])
    routing = Routing(estimate_ttl_s=600)
    sent(routing, E1, fleet)
    sent(routing, E2, fleet)
    assert routing.estimate(fleet, "m", PROMPT, (), 1) == MatchAnswer((guess(E1, 3), guess(E2, 1)))


def test_what_was_just_routed_is_expected_and_only_of_engines_that_are_known() -> None:
    routing = Routing(estimate_ttl_s=600)
    held = MatchAnswer((EngineMatch(E1, 3, {Medium.GPU: 3}, True),), (E2,))
    assert routing.expect(held, FLEET, "m", PROMPT, ()) is held
    for engine in (E1, E2, E3):
        sent(routing, engine, request=str(engine))
    assert routing.expect(held, FLEET, "m", PROMPT, ()) == MatchAnswer(
        (EngineMatch(E1, 3, {Medium.GPU: 3}, True, expected=8),), (E2,)
    )
    nothing = MatchAnswer((), (E2,))
    assert routing.expect(nothing, FLEET, "m", PROMPT, ()) == MatchAnswer(
        (EngineMatch(E1, 0, {}, True, expected=8),), (E2,)
    )
    assert routing.expect(nothing, FLEET, "m", PROMPT, [E2]) == nothing
    more = MatchAnswer((EngineMatch(E1, 9, {Medium.GPU: 9}, True),), (E2,))
    assert routing.expect(more, FLEET, "m", PROMPT, ()) == more


def test_a_failed_request_is_expected_no_more_but_stays_in_the_history() -> None:
    routing = Routing(estimate_ttl_s=600)
    sent(routing, E1)
    routing.observe("r", Finished("x", E1, "m", None, 0, False, Outcome.ERROR), FLEET, 1)
    assert routing.expect(MatchAnswer(), FLEET, "m", PROMPT, ()) == MatchAnswer()
    assert routing.estimate(FLEET, "m", PROMPT, [E1], 1) == MatchAnswer((guess(E1, 8),))


def test_an_engine_that_restarts_or_leaves_is_forgotten() -> None:
    routing = Routing(estimate_ttl_s=600)
    for engine in (E1, E2):
        sent(routing, engine, request=str(engine))
    routing.on_tick(1, FLEET)
    routing.forget(E1)
    assert routing.estimate(FLEET, "m", PROMPT, (), 1) == MatchAnswer((guess(E2, 2),))
    assert routing.expect(MatchAnswer(), FLEET, "m", PROMPT, ()) == MatchAnswer()
    routing.on_tick(2, Fleet.of([FLEET.engines[E1]]))
    assert routing.estimate(FLEET, "m", PROMPT, (), 2) == MatchAnswer()
    assert len(routing.history) == len(routing.predicted) == 0
