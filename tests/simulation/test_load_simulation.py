"""Whole loads in virtual time: the same again, true to the engines, through faults, and to the last request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Segment
from kvatlas_loadtest.loads.outcomes import from_json, to_json
from kvatlas_loadtest.loads.presets import REFERENCE, EnginePreset
from kvatlas_loadtest.loads.routing import POLICIES
from kvatlas_loadtest.loads.settings import Crash, Settings
from kvatlas_loadtest.loads.simulation import Simulation

SMALL = EnginePreset(replace(REFERENCE.limits, num_blocks=200), REFERENCE.time_model)
"""Engines whose caches are soon full."""


def load(requests: int = 150, rate: float = 12.0) -> list[Arrival]:
    """A dozen shared openings, more than one small engine holds, and salts."""
    chance = random.Random(7)
    at_s, arrivals = 0.0, []
    for number in range(requests):
        at_s += chance.expovariate(rate)
        prompt = (Segment(chance.randrange(12), 1500), Segment(100 + number, chance.randint(1, 300)))
        salt = chance.choice((None, None, "a"))
        arrivals.append(Arrival(round(at_s, 6), prompt, chance.randint(1, 150), f"user-{number % 9}", salt))
    return arrivals


def conversations() -> list[Arrival]:
    arrivals: list[Arrival] = []
    for number in range(12):
        prompt: tuple[Segment | Answer, ...] = (Segment(number % 2, 400),)
        for turn in range(4):
            after = len(arrivals) - 1 if turn else None
            prompt = (*prompt, Segment(1000 + 10 * number + turn, 60))
            arrivals.append(Arrival(number * 0.3, prompt, 70, after=after, think_s=0.5 * bool(turn)))
            prompt = (*prompt, Answer(len(arrivals) - 1))
    return arrivals


def simulation(arrivals: Sequence[Arrival], policy: str = "precise", **settings: object) -> Simulation:
    return Simulation("test", arrivals, policy, Settings(engines=3, preset=SMALL, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_settings_give_the_same_run_byte_for_byte(policy: str) -> None:
    once, again = (to_json(simulation(load(60), policy, routers=2).run()) for _ in range(2))
    assert once == again
    run = from_json(once)
    assert [outcome.arrival for outcome in run.outcomes] == list(range(60))
    assert not [outcome for outcome in run.outcomes if outcome.error]


def test_another_seed_is_another_run() -> None:
    one, other = (simulation(load(60), "random", seed=seed).run() for seed in (1, 2))
    assert [o.engine for o in one.outcomes] != [o.engine for o in other.outcomes]


def test_in_the_end_the_index_is_what_the_engines_hold() -> None:
    whole = simulation(load())
    whole.run()
    whole.index.catch_up(1e6)
    for engine in whole.engines.values():
        assert engine.copies()
        assert whole.index.table(engine.id) == engine.copies()
    assert not whole.index.findings


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_lost_messages_are_replayed(delay_s: float) -> None:
    """All but the very last of an engine: no later one shows that it is missing."""
    whole = simulation(load(), lost_share=0.1, event_delay_s=delay_s)
    whole.run()
    whole.index.catch_up(1e6)
    assert whole.index.lost > 10
    wrong = [whole.index.table(engine.id).items() ^ engine.copies().items() for engine in whole.engines.values()]
    assert sum(map(len, wrong)) <= 4


def test_without_replay_lost_messages_cost_hits_and_no_request() -> None:
    run = simulation(load(), lost_share=0.3, replay=False).run()
    assert not [outcome for outcome in run.outcomes if outcome.error]


def test_a_crash_cuts_answers_that_have_begun_and_nothing_else() -> None:
    whole = simulation(load(), crashes=(Crash(0, 4.0, 6.0),))
    run = whole.run()
    assert {outcome.error for outcome in run.outcomes} == {"", "cut"}
    assert all(outcome.first_token_s is not None for outcome in run.outcomes if outcome.error)
    assert all(outcome.finished_s is not None for outcome in run.outcomes)
    back = [o for o in run.outcomes if o.engine == whole_number(whole, 0) and o.sent_s > 8.0]
    assert back
    whole.index.catch_up(1e6)
    for engine in whole.engines.values():
        assert whole.index.table(engine.id) == engine.copies()


def whole_number(whole: Simulation, place: int) -> str:
    return list(whole.engines.values())[place].number


@pytest.mark.parametrize("routers", [1, 3])
def test_turns_are_sent_after_their_answers_and_find_them_cached(routers: int) -> None:
    arrivals = conversations()
    run = simulation(arrivals, routers=routers).run()
    for outcome in run.outcomes:
        arrival = arrivals[outcome.arrival]
        if arrival.after is not None:
            before = run.outcomes[arrival.after]
            assert before.finished_s is not None
            assert outcome.sent_s >= before.finished_s + arrival.think_s - 1e-5
    cached = sum(outcome.cached_tokens for outcome in run.outcomes)
    assert 0.9 * run.oracle_cached_tokens <= cached <= run.oracle_cached_tokens


def test_a_stage_begins_when_everything_before_has_been_answered() -> None:
    staged = [replace(arrival, stage=number // 20, at_s=0.1) for number, arrival in enumerate(load(60))]
    run = simulation(staged).run()
    for stage in (1, 2):
        ended = max(o.finished_s or 0.0 for o in run.outcomes if o.stage == stage - 1)
        began = min(o.sent_s for o in run.outcomes if o.stage == stage)
        assert began == pytest.approx(ended + 0.1)


def test_no_policy_serves_more_from_caches_than_the_oracle() -> None:
    run = simulation(load(), "precise").run()
    assert sum(outcome.cached_tokens for outcome in run.outcomes) <= run.oracle_cached_tokens


def test_a_prompt_that_fits_no_engine_fails_and_is_not_waited_for() -> None:
    arrivals = [Arrival(0.0, (Segment(1, 100_000),), 10), Arrival(0.0, (Segment(2, 100),), 10, after=0)]
    first, second = simulation(arrivals).run().outcomes
    assert first.error == "prompt-too-long"
    assert not second.error


def test_samples_tell_the_queues() -> None:
    run = simulation(load(rate=60.0), "random").run()
    assert any(sample.waiting for sample in run.samples)
    assert all(0 <= sample.kv_usage <= 1 for sample in run.samples)
