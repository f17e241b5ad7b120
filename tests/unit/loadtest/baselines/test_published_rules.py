"""The rules of others: what their documentation says they prefer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import pytest

from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.published import Dynamo, LlmD, Smg, VllmRouter
from kvatlas_loadtest.baselines.rules import Asked, Rule, Seen
from kvatlas_loadtest.loads.routing import ByRule, decider

A, B, C = (EngineId(f"10.0.0.{n}:8000") for n in (1, 2, 3))
ASKED = Asked(prompt_tokens=6400, keys=range(99), session=None, prefix="p", block_size=64)


def first(rule: Rule, seen: Sequence[Seen], chance: float = 0.5) -> EngineId:
    ranked = rule.rank(ASKED, seen, lambda: chance)
    assert sorted(ranked) == sorted(s.engine for s in seen)
    return ranked[0]


def test_llm_d_weighs_prefix_queue_and_kv_usage() -> None:
    held = Seen(A, cached_tokens=6336, waiting=0, kv_usage=0.9)
    empty = Seen(B, waiting=0, kv_usage=0.0)
    assert first(LlmD(), [held, empty]) == A  # 3 x 0.99 + 2 x 0.1 against 2 x 1; the queues are equal
    queued = Seen(A, cached_tokens=6336, waiting=8, kv_usage=0.9)
    assert first(LlmD(), [queued, empty]) == B  # the longest queue scores 0, the shortest 2
    assert first(LlmD(prefix=5), [queued, empty]) == A


def test_dynamo_adds_prefill_and_decode_blocks() -> None:
    held = Seen(A, cached_tokens=6336, blocks=50)
    empty = Seen(B)
    assert first(Dynamo(), [held, empty]) == A  # 1 + 50 against 100
    assert first(Dynamo(), [Seen(A, cached_tokens=6336, blocks=150), empty]) == B
    assert first(Dynamo(weight=2), [Seen(A, cached_tokens=6336, blocks=150), empty]) == A


def test_dynamo_with_a_temperature_tries_others() -> None:
    seen = [Seen(A, cached_tokens=6336), Seen(B)]
    assert first(Dynamo(temperature=1.0), seen, chance=0.0) == A
    assert first(Dynamo(temperature=1.0), seen, chance=0.99) == B


def test_vllm_router_multiplies_tokens_by_requests() -> None:
    assert first(VllmRouter(), [Seen(A, cached_tokens=3200, requests=0), Seen(B)]) == A
    assert first(VllmRouter(), [Seen(A, cached_tokens=3200, requests=1), Seen(B, cached_tokens=64)]) == B
    assert first(VllmRouter(), [Seen(A, prefill_tokens=1, requests=0), Seen(B)]) == B


def test_smg_follows_the_overlap_until_the_loads_differ() -> None:
    empty = Seen(B)
    assert first(Smg(), [Seen(A, cached_tokens=6336, requests=64), empty]) == A
    assert first(Smg(), [Seen(A, cached_tokens=6336, requests=65), empty]) == B
    assert first(Smg(), [Seen(A, cached_tokens=6336, requests=165), Seen(B, requests=111)]) == A  # not 1.5 times
    assert first(Smg(), [Seen(A, cached_tokens=1280, requests=1), empty]) == B  # 20 % is below the threshold
    assert first(Smg(), [Seen(A, cached_tokens=6336, requests=3), Seen(C, cached_tokens=6336)]) == C


def test_parameters_are_given_with_the_name() -> None:
    made = decider("llm-d:prefix=5:kv=0", repeat(0.5).__next__)
    assert isinstance(made, ByRule)
    assert made.rule == LlmD(prefix=5.0, queue=2.0, kv=0.0)


@pytest.mark.parametrize(
    ("policy", "why"), [("nearest", "precise"), ("dynamo:mass=2", "weight"), ("smg:absolute=x", "x")]
)
def test_what_does_not_exist_is_refused(policy: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decider(policy, repeat(0.5).__next__)
