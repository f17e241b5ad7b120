"""What the chooser keeps between requests: what is in flight, what will be held soon, whose traffic it is."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from kvatlas_common.fleet import EngineView, Head, Health, InFlight, Load, Sync
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.choice import Choice
from kvatlas_router.core.chooser import BURST_S, Chooser
from kvatlas_router.core.policies import PolicyName, policy

PROFILE = "sha256_cbor/b64/tagged/seed=42"
A, B = EngineId("a:1"), EngineId("b:1")
VIEWS = [
    EngineView(e, f"http://{e}", health=Health.READY, profile=PROFILE, block_size=64, sync=Sync.EXACT) for e in (A, B)
]
PRECISE = policy(PolicyName.PRECISE)
NOBODY = MatchAnswer()


def ask(first: int, blocks: int = 100) -> Ask:
    return Ask("m", blocks * 64 + 1, {PROFILE: np.arange(first, first + blocks, dtype=np.uint64)})


def choose(
    chooser: Chooser,
    wanted: Ask,
    now: float,
    answer: MatchAnswer = NOBODY,
    loads: Mapping[EngineId, Load] | None = None,
) -> Choice:
    choice = chooser.choose(PRECISE, wanted, VIEWS, loads=loads or {}, answer=answer, now=now)
    assert choice is not None
    return choice


def test_a_burst_that_shares_a_new_prefix_lands_together() -> None:
    chooser = Chooser(random.Random(1).random)
    engines = set()
    for n in range(10):
        shared = replace(ask(0), keys={PROFILE: np.append(np.arange(99, dtype=np.uint64), np.uint64(1000 + n))})
        choice = choose(chooser, shared, 1.0)
        assert choice.terms[0].cached_tokens == 0  # nobody has said that it is there
        chooser.send(choice.terms[0], shared, 1.0)
        engines.add(choice.engine.id)
    assert len(engines) == 1


def test_different_prompts_of_a_burst_spread() -> None:
    chooser = Chooser(random.Random(1).random)
    sent = [choose(chooser, ask(n * 1000), 1.0) for n in range(1)]
    for n in range(10):
        choice = choose(chooser, ask(n * 1000), 1.0)
        chooser.send(choice.terms[0], ask(n * 1000), 1.0)
        sent.append(choice)
    assert {c.engine.id for c in sent[:3]} == {A, B}
    assert abs(sum(c.engine.id == A for c in sent[1:]) - 5) <= 1


def test_what_was_sent_long_ago_and_never_confirmed_is_not_expected_any_more() -> None:
    chooser = Chooser(random.Random(1).random)
    chooser.send(choose(chooser, ask(0), 1.0).terms[0], ask(0), 1.0).close()
    assert choose(chooser, ask(0), 2.0).terms[0].to_compute == 1
    assert choose(chooser, ask(0), 2.0 + BURST_S).terms[0].to_compute == 6401


def test_what_other_routers_sent_counts_like_our_own() -> None:
    chooser = Chooser(random.Random(1).random)
    load = {A: Load(others=InFlight(prefilling=2, prefill_tokens=9000, decoding=3))}
    choice = choose(chooser, ask(0), 1.0, loads=load)
    assert choice.engine.id == B
    assert choice.terms[1].ahead[:3] == (9000, 2, 3)


def queued(ours: int, load: Load, now: float) -> int:
    """At an engine that computes 10,000 tokens a second, where a prompt of ours came at 1.0 s."""
    chooser = Chooser(random.Random(1).random)
    chooser.books.enter(A, ours, 1.0)
    choice = choose(chooser, ask(0), now, loads={A: load})
    return next(t.ahead.queued_tokens for t in choice.terms if t.engine == A)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (Head(3000, 0.9), 6000 + 3000 - 2000),  # theirs is being computed, for 0.2 s
        (Head(3000, 0.5), 6000 + 3000 - 2850),  # ... and is nearly done
        (Head(0, 1.0), 6000 + 3000 - 1000),  # ours is, since it came
        (Head(0, 1.05), 6000 + 3000 - 500),  # ... since another one was done
        (Head(), 6000 + 3000 - 1000),  # they tell of none, and we know of ours
    ],
)
def test_one_prompt_is_being_computed_theirs_or_ours(head: Head, expected: int) -> None:
    load = Load(others=InFlight(prefilling=1, prefill_tokens=3000), head=head)
    assert queued(6000, load, 1.1) == expected


def test_traffic_of_strangers_counts_once_it_is_steady() -> None:
    chooser = Chooser(random.Random(1).random)
    for turn in range(3):
        load = {A: Load(running=5, waiting=2, scraped_at=100.0 + turn)}
        choice = choose(chooser, ask(0), 1.0 + turn, loads=load)
        of_a = next(t for t in choice.terms if t.engine == A)
        assert (of_a.ahead.pending, of_a.ahead.decoding) == ((2, 5) if turn == 2 else (0, 0))
        assert choose(chooser, ask(0), 1.0 + turn, loads=load) is not None  # the same figures are not counted again


def test_our_own_requests_are_no_strangers() -> None:
    chooser = Chooser(random.Random(1).random)
    for turn in range(4):
        chooser.send(choose(chooser, ask(0), 1.0, MatchAnswer((held(A, 100),))).terms[0], ask(0), 1.0)
        load = {A: Load(running=turn, waiting=1, scraped_at=100.0 + turn)}
        of_a = choose(chooser, ask(0), 1.0, MatchAnswer((held(A, 100),)), load).terms[0]
        assert of_a.ahead.in_flight == turn + 1


def held(engine: EngineId, blocks: int) -> EngineMatch:
    return EngineMatch(engine, blocks, {Medium.GPU: blocks}, True)


def test_an_answer_teaches_how_fast_its_engine_is() -> None:
    chooser = Chooser(random.Random(1).random)
    before = chooser.rates.of(A)
    for n in range(20):
        at = 10.0 * n
        term = next(t for t in choose(chooser, ask(n * 1000), at).terms if t.engine == A)
        with chooser.send(term, ask(n * 1000), at) as ticket:
            ticket.started(at + 5.0)
            ticket.ended(at + 6.0, cached_tokens=0, completion_tokens=50)
    assert chooser.rates.of(A).token_s == pytest.approx(5.0 / 6401, rel=0.15)
    assert before.token_s < chooser.rates.of(A).token_s


def test_an_answer_that_was_cut_teaches_nothing() -> None:
    chooser = Chooser(random.Random(1).random)
    term = choose(chooser, ask(0), 1.0).terms[0]
    with chooser.send(term, ask(0), 1.0) as ticket:
        ticket.started(90.0)
    assert chooser.rates.of(term.engine) == Chooser(random.Random(1).random).rates.of(term.engine)


def test_an_engine_known_to_be_empty_is_known() -> None:
    chooser = Chooser(random.Random(1).random)
    views = [replace(VIEWS[0], profile=None, block_size=None), VIEWS[1]]
    choice = chooser.choose(PRECISE, ask(0), views, loads={}, answer=MatchAnswer(unknown=(B,)), now=1.0)
    assert choice is not None
    assert {t.engine: t.cached_tokens for t in choice.terms} == {A: 0, B: None}


def test_what_was_prepared_is_no_other_choice_and_what_happened_since_counts() -> None:
    ready, plain = (Chooser(random.Random(1).random) for _ in range(2))
    for n in range(30):
        now = n / 100
        ready.prepare(VIEWS, {}, now)
        engines = []
        for chooser in (ready, plain):
            chooser.send(choose(chooser, ask(n * 1000), now).terms[0], ask(n * 1000), now)
            choice = choose(chooser, ask(n * 1000 + 500), now)
            chooser.send(choice.terms[0], ask(n * 1000 + 500), now)
            engines.append([(term.engine, term.ahead) for term in choice.terms])
        assert engines[0] == engines[1]
