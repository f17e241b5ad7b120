"""Coasting is exact: whatever an engine is asked, its steps come out as if every one had been scheduled by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_loadtest.block_pool import PoolVersion
from kvatlas_loadtest.coasting import CoastingCore
from kvatlas_loadtest.kv_events import KvEvent
from kvatlas_loadtest.scheduler import EngineLimits, EngineRequest
from kvatlas_loadtest.time_model import StepWork
from tests.unit.loadtest.test_engine_scheduler import PrefixChain

BLOCK = 4

Asked = tuple[int, tuple[int, int, int]]  # (before which step, (prompt's text, prompt tokens, output tokens))
ASKED = st.lists(
    st.tuples(st.integers(0, 60), st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 40))), max_size=12
)


@dataclass
class Engine:
    """One engine that keeps a record of its steps."""

    limits: EngineLimits
    coasts: bool
    steps: list[tuple[StepWork, tuple[KvEvent, ...], frozenset[str], frozenset[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = CoastingCore(self.limits)
        self.requests: list[EngineRequest] = []

    def ask(self, text: int, prompt: int, output: int) -> None:
        number = len(self.requests)
        request = EngineRequest(str(number), [text] * prompt, output, PrefixChain(), lambda i: number * i)
        self.requests.append(request)
        self.core.add(request)

    def step(self) -> bool:
        if self.coasts:
            stepped = self.core.step()
            if stepped is None:
                return False
            ended = frozenset(request.id for request in stepped.ended)
            began = frozenset(request.id for request in stepped.began)
            self.steps.append((stepped.work, tuple(stepped.events), began, ended))
            return True
        step = self.core.schedule()
        if step is None:
            return False
        result = self.core.complete(step)
        ended = frozenset(s.request.id for s in result.sampled if s.finish_reason)
        began = frozenset(s.request.id for s in result.sampled if len(s.request.output) == 1)
        self.steps.append((step.work, tuple(result.events), began, ended))
        return True


def run(engine: Engine, asked: list[Asked], aborted: Sequence[tuple[int, int]] = ()) -> None:
    waiting = sorted(asked, key=lambda each: each[0])
    at = 0
    while True:
        while waiting and waiting[0][0] <= at:
            engine.ask(*waiting.pop(0)[1])
        for when, number in aborted:
            if when == at and number < len(engine.requests):
                engine.core.abort(engine.requests[number])
        if not engine.step() and not waiting:
            return
        at += 1


@given(
    asked=ASKED,
    blocks=st.integers(19, 40),
    seqs=st.integers(1, 6),
    budget=st.integers(2, 40),
    version=st.sampled_from(PoolVersion),
)
@settings(max_examples=150, deadline=None)
def test_a_coast_is_the_same_as_its_steps(
    asked: list[Asked], blocks: int, seqs: int, budget: int, version: PoolVersion
) -> None:
    limits = EngineLimits(blocks, BLOCK, version, max_num_batched_tokens=budget, max_num_seqs=seqs)
    slow, fast = Engine(limits, coasts=False), Engine(limits, coasts=True)
    for engine in (slow, fast):
        run(engine, asked)
    assert fast.steps == slow.steps
    assert [request.output for request in fast.requests] == [request.output for request in slow.requests]
    assert [request.cached_tokens for request in fast.requests] == [r.cached_tokens for r in slow.requests]
    assert fast.core.counters == slow.core.counters
    assert fast.core.copies() == slow.core.copies()


def test_a_full_pool_preempts_as_ever() -> None:
    limits = EngineLimits(19, BLOCK, max_num_seqs=4)
    slow, fast = Engine(limits, coasts=False), Engine(limits, coasts=True)
    for engine in (slow, fast):
        run(engine, [(0, (text, 12, 40)) for text in (1, 2, 3)])
    assert fast.core.counters.preemptions > 0
    assert fast.steps == slow.steps


@given(ASKED, st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_ends_early_ends_alike(asked: list[Asked], aborted: list[tuple[int, int]]) -> None:
    limits = EngineLimits(25, BLOCK, max_num_batched_tokens=16, max_num_seqs=4)
    slow, fast = Engine(limits, coasts=False), Engine(limits, coasts=True)
    for engine in (slow, fast):
        run(engine, asked, aborted)
    assert fast.steps == slow.steps
    assert fast.core.copies() == slow.core.copies()


def test_a_request_with_stop_tokens_is_scheduled_step_by_step() -> None:
    engine = Engine(EngineLimits(40, BLOCK), coasts=True)
    request = EngineRequest("stops", [1] * 10, 30, PrefixChain(), lambda i: i, stop_ids={5})
    engine.core.add(request)
    run(engine, [])
    assert request.output == [0, 1, 2, 3, 4, 5]
