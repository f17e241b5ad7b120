"""Speeds learnt from answers: they come close to the truth, through noise and from a wrong prior."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.rates import PRIOR, Rates, Served, Speed

A, B = EngineId("a:1"), EngineId("b:1")


def answer(true: Speed, chance: random.Random, noise: float = 0.0, engine: EngineId = A, **also: int) -> Served:
    """What an engine of this speed would show of a request drawn at random."""
    small = chance.random() < 0.3
    computed = chance.randrange(16, 128) if small else chance.randrange(800, 8000)
    ahead = 0 if small else chance.choice([0, 0, 3000])
    decoding, completion = chance.randrange(0, 60), chance.randrange(50, 400)
    spread = chance.uniform(1 - noise, 1 + noise)
    step_s = (true.step_s + true.decode_s * (decoding + 1)) * spread
    return Served(
        engine,
        first_token_s=(true.overhead_s + true.prefill_s(ahead + computed, decoding)) * spread,
        ahead=ahead,
        computed=computed,
        decoding=decoding,
        completion_tokens=completion,
        decode_total_s=step_s * (completion - 1),
        decoding_at_end=decoding,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.00003, 0.001), st.floats(0.005, 0.1), st.floats(0.005, 0.03), st.floats(0.00002, 0.0004), st.integers()
)
def test_any_engine_is_learnt_through_noise(
    token_s: float, overhead_s: float, step_s: float, decode_s: float, seed: int
) -> None:
    true, chance, rates = Speed(token_s, overhead_s, step_s, decode_s), random.Random(seed), Rates()
    for _ in range(300):
        rates.learn(answer(true, chance, noise=0.3))
    learnt = rates.of(A)
    for tokens in (1000, 6000, 20_000):
        assert learnt.prefill_s(tokens, 20) == pytest.approx(true.prefill_s(tokens, 20), rel=0.3)


def test_one_stall_does_not_change_what_is_known() -> None:
    chance, rates = random.Random(1), Rates()
    for _ in range(100):
        rates.learn(answer(PRIOR, chance))
    before = rates.of(A)
    rates.learn(Served(A, first_token_s=60.0, ahead=0, computed=1000, decoding=0))
    assert rates.of(A).token_s < before.token_s * 1.1


def test_an_engine_not_seen_yet_is_like_the_rest_of_the_fleet() -> None:
    chance, rates = random.Random(1), Rates()
    assert rates.of(B) == PRIOR
    slow = Speed(token_s=0.0008)
    for _ in range(200):
        rates.learn(answer(slow, chance))
    assert rates.of(B).token_s == pytest.approx(0.0008, rel=0.1)
    rates.keep_only([B])
    assert rates.of(A) == rates.of(B)


def test_engines_differ() -> None:
    chance, rates = random.Random(1), Rates()
    for _ in range(200):
        rates.learn(answer(Speed(token_s=0.0001), chance, 0.2, A))
        rates.learn(answer(Speed(token_s=0.0004), chance, 0.2, B))
    assert rates.of(B).token_s / rates.of(A).token_s == pytest.approx(4, rel=0.2)


def test_slow_media_are_learnt_from_what_is_left_of_the_time() -> None:
    rates = Rates()
    true_s = PRIOR.cpu_token_s * 5
    for _ in range(200):
        first = PRIOR.overhead_s + PRIOR.prefill_s(100, 0) + true_s * 4000
        rates.learn(Served(A, first, ahead=0, computed=100, decoding=0, transferred=((Medium.CPU, 4000),)))
    assert rates.of(A).cpu_token_s == pytest.approx(true_s, rel=0.1)
    assert rates.of(A).storage_token_s == PRIOR.storage_token_s


def test_how_long_answers_are() -> None:
    rates = Rates()
    for _ in range(300):
        rates.learn(Served(A, 0.1, ahead=0, computed=10, decoding=0, completion_tokens=1000, decode_total_s=10.0))
    assert rates.answer_tokens == pytest.approx(1000, rel=0.02)
