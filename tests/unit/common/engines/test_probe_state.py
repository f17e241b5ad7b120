"""The rules of probing, step by step and without I/O."""

from __future__ import annotations

import random

import pytest

from kvatlas_common.engines.pages import ServedModels
from kvatlas_common.engines.probe import EngineFacts, ProbePlan, ProbeState, Work
from kvatlas_common.engines.specs import parse_engine
from kvatlas_common.fleet import Health, Load
from kvatlas_common.words import EngineId

STEADY = ProbePlan(interval_s=1.0, idle_interval_s=3.0, jitter=0.0)
RNG = random.Random(1)


def page(running: int = 0, start_s: int = 100, rank: int = 0) -> bytes:
    return (
        f'process_start_time_seconds {start_s}\nvllm:num_requests_running{{engine="{rank}"}} {running}\n'
        f'vllm:num_requests_waiting{{engine="{rank}"}} 0\nvllm:kv_cache_usage_perc{{engine="{rank}"}} 0.5\n'
    ).encode()


def state(written: str = "a:1") -> ProbeState:
    return ProbeState(parse_engine(written), STEADY)


def facts(probe: ProbeState) -> EngineFacts:
    (only,) = probe.facts()
    return only


def load(probe: ProbeState) -> Load:
    (only,) = probe.loads().values()
    return only


def good_round(probe: ProbeState, running: int = 0, at: float = 1000.0, start_s: int = 100) -> None:
    probe.healthy(0.0)
    probe.measured(page(running, start_s), at)


def test_never_asked_is_unknown() -> None:
    assert facts(state()) == EngineFacts(EngineId("a:1"))


def test_down_after_three_failures_in_a_row_and_ready_at_once() -> None:
    probe = state()
    good_round(probe)
    for _ in range(2):
        probe.failed("/health did not answer within 2 s")
        assert facts(probe).health is Health.READY
    good_round(probe)
    assert facts(probe).error == ""
    for _ in range(3):
        assert facts(probe).health is Health.READY
        probe.failed("/health did not answer within 2 s")
    assert facts(probe).health is Health.DOWN
    assert facts(probe).error == "/health did not answer within 2 s"
    good_round(probe)
    assert (facts(probe).health, facts(probe).error) == (Health.READY, "")


def test_down_after_two_refusals() -> None:
    probe = state()
    probe.failed("nobody listens", refused=True)
    assert facts(probe).health is Health.UNKNOWN
    probe.failed("nobody listens", refused=True)
    assert facts(probe).health is Health.DOWN


def test_the_pause_grows_while_idle_and_while_down() -> None:
    probe = state()
    good_round(probe, running=1)
    pauses = []
    for running in (1, 0, 0, 0, 0, 0, 2):
        good_round(probe, running)
        pauses.append(probe.pause_s(RNG))
    assert pauses == [1.0, 1.0, 1.5, 2.25, 3.0, 3.0, 1.0]
    pauses = []
    for _ in range(6):
        probe.failed("hung")
        pauses.append(probe.pause_s(RNG))
    assert pauses == [0.5, 0.5, 1.0, 2.0, 3.0, 3.0]
    good_round(probe, running=2)
    assert probe.pause_s(RNG) == 1.0


def test_a_hung_engine_is_down_within_the_lease_by_the_default_plan() -> None:
    plan = ProbePlan()
    worst = plan.idle_interval_s * (1 + plan.jitter) + plan.timeout_s + plan.retry_s * (1 + plan.jitter)
    for failure in range(plan.failures_to_down):
        worst += plan.timeout_s + (plan.retry_s * (1 + plan.jitter) if failure else 0)
    assert worst < 15


def test_jitter_keeps_within_its_share() -> None:
    probe = ProbeState(parse_engine("a:1"), ProbePlan(interval_s=1.0, jitter=0.2))
    good_round(probe, running=1)
    pauses = [probe.pause_s(RNG) for _ in range(200)]
    assert 0.8 <= min(pauses) < 0.85
    assert 1.15 < max(pauses) <= 1.2


def test_scraped_at_is_when_a_busy_engine_said_so_and_when_an_idle_one_began_to() -> None:
    probe = state()
    assert probe.loads() == {}
    good_round(probe, running=1, at=10.0)
    known = facts(probe)
    good_round(probe, running=1, at=11.0)
    assert load(probe) == Load(1, 0, 0.5, 11.0)
    good_round(probe, running=0, at=12.0)
    good_round(probe, running=0, at=13.0)
    assert load(probe) == Load(0, 0, 0.5, 12.0)
    assert facts(probe) == known


def test_adapters_are_those_of_the_latest_sample() -> None:
    probe = state()
    samples = b"".join(
        b'vllm:lora_requests_info{max_lora="4",running_lora_adapters="%s",waiting_lora_adapters="%s"} %d\n' % sample
        for sample in ((b"a", b"", 100), (b"b,c", b"a, d", 300), (b"", b"", 200))
    )
    probe.measured(page(running=2) + samples, 10.0)
    assert load(probe).loras == {"a", "b", "c", "d"}
    probe.measured(page(running=2), 11.0)
    assert load(probe).loras == {"a", "b", "c", "d"}
    probe.measured(page() + samples + b'vllm:lora_requests_info{running_lora_adapters=""} 301\n', 12.0)
    assert load(probe).loras == frozenset()


def test_health_is_asked_seldom_while_metrics_come_and_at_once_when_they_do_not() -> None:
    probe = state()
    assert probe.wants_health(0.0)
    good_round(probe)
    assert not probe.wants_health(4.9)
    assert probe.wants_health(5.0)
    probe.unmeasured("/metrics answered 404")
    assert not probe.wants_health(4.9)
    probe.unmeasured("/metrics did not answer within 2 s", alive=False)
    assert probe.wants_health(0.0)
    assert probe.pause_s(RNG) == STEADY.retry_s
    good_round(probe)
    probe.failed("/health answered 503")
    probe.measured(page(), 10.0)
    assert probe.wants_health(0.0)  # metrics are no sign of health where it is denied


def test_models_are_asked_at_first_then_when_due_then_when_it_comes_back_or_restarts() -> None:
    probe = state()
    assert probe.wants_models(0.0)
    good_round(probe)
    probe.listed(ServedModels(frozenset({"m"}), root="/m", max_model_len=9), now=0.0)
    assert not probe.wants_models(9.9)
    assert probe.wants_models(10.0)
    good_round(probe, start_s=101)
    assert probe.wants_models(1.0)
    assert facts(probe).process_start_s == 101
    probe.unlisted("/v1/models answered 401", now=1.0)
    assert not probe.wants_models(2.0)
    assert (facts(probe).error, facts(probe).models) == ("/v1/models answered 401", frozenset({"m"}))
    probe.failed("gone")
    assert probe.wants_models(2.0)


def test_a_metrics_page_without_the_figures_keeps_the_last_and_says_so() -> None:
    probe = state()
    good_round(probe, running=3, at=10.0)
    probe.healthy(0.0)
    probe.measured(b"<html>", 11.0)
    assert facts(probe).health is Health.READY
    assert load(probe) == Load(3, 0, 0.5, 10.0)
    assert facts(probe).process_start_s == 100
    assert "how many requests run" in facts(probe).error
    good_round(probe, running=3)
    assert facts(probe).error == ""


def test_ranks_share_their_health_and_have_loads_of_their_own() -> None:
    probe = state("a:1,ranks=2")
    probe.healthy(0.0)
    probe.measured(page(running=1, rank=0) + page(running=5, rank=1), 10.0)
    assert [(str(f.id), f.health) for f in probe.facts()] == [("a:1", Health.READY), ("a:1/dp1", Health.READY)]
    assert [load.running for load in probe.loads().values()] == [1, 5]
    probe.measured(page(running=2, rank=0), 11.0)
    assert [load.running for load in probe.loads().values()] == [2, 5]
    assert "nothing of rank 1" in probe.facts()[0].error


def test_an_address_with_one_rank_may_be_any_rank_of_its_group() -> None:
    probe = state()
    probe.healthy(0.0)
    probe.measured(page(running=4, rank=3), 10.0)
    assert load(probe).running == 4


@pytest.mark.parametrize("length", [10, 10_000])
def test_an_error_is_bounded(length: int) -> None:
    probe = state()
    probe.failed("x" * length)
    assert len(facts(probe).error) == min(length, 300)


def test_each_life_is_asked_for_its_version_if_anybody_wants_to_know() -> None:
    assert not state().wants_version()
    probe = ProbeState(parse_engine("a:1"), ProbePlan(versions=True))
    assert probe.wants_version()
    probe.versioned("0.32.0")
    assert (probe.wants_version(), facts(probe).version) == (False, "0.32.0")
    good_round(probe, start_s=100)
    assert probe.wants_version(), "it is another process"


def test_what_it_has_computed_is_told_by_rank() -> None:
    probe = state()
    figures = b'vllm:prefix_cache_queries_total{engine="0"} 100\nvllm:prefix_cache_hits_total{engine="0"} 36\n'
    probe.measured(page() + figures, 1000.0)
    assert probe.works() == {EngineId("a:1"): Work(computed_tokens=64)}
