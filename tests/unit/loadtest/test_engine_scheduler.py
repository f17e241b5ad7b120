"""Steps of one simulated engine: what is computed when, and that its events tell the whole truth about its cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_loadtest.block_pool import PoolVersion
from kvatlas_loadtest.kv_events import Cleared, KvEvent, Removed, Stored
from kvatlas_loadtest.scheduler import (
    EngineCore,
    EngineFull,
    EngineLimits,
    EngineRequest,
    PromptTooLong,
    Sampled,
    Step,
)

BLOCK = 4


class PrefixChain:
    """A block's hash is a hash of all tokens up to its end."""

    def __init__(self) -> None:
        self._before: tuple[int, ...] = ()

    def extend(self, token_ids: Sequence[int]) -> list[int]:
        hashes = []
        for start in range(0, len(token_ids), BLOCK):
            self._before += tuple(token_ids[start : start + BLOCK])
            hashes.append(hash(self._before) & 0xFFFFFFFF)
        return hashes


def request(prompt: Sequence[int], max_tokens: int = 1, name: str = "r") -> EngineRequest:
    return EngineRequest(name, list(prompt), max_tokens, PrefixChain(), lambda i: 1000 + i)


def core(**limits: object) -> EngineCore:
    return EngineCore(EngineLimits(block_size=BLOCK, **{"num_blocks": 50, **limits}))  # type: ignore[arg-type]


def run(engine: EngineCore) -> tuple[list[KvEvent], list[Sampled], list[Step]]:
    """Until there is nothing to do."""
    events: list[KvEvent] = []
    sampled: list[Sampled] = []
    steps: list[Step] = []
    while step := engine.schedule():
        result = engine.complete(step)
        events += result.events
        sampled += result.sampled
        steps.append(step)
    return events, sampled, steps


def apply(index: Counter[int], events: Sequence[KvEvent]) -> None:
    """What a consumer of the events makes of them."""
    for event in events:
        if isinstance(event, Stored):
            index.update(event.hashes)  # type: ignore[arg-type]
        elif isinstance(event, Removed):
            assert isinstance(event.hash, int)
            index[event.hash] -= 1
            assert index[event.hash] >= 0
        else:
            index.clear()


def test_a_prompt_is_computed_in_chunks_and_each_chunk_published() -> None:
    engine = core(max_num_batched_tokens=10)
    engine.add(request(range(25), max_tokens=2))
    events, sampled, steps = run(engine)
    assert [count for step in steps for _, count in step.scheduled] == [10, 10, 5, 1]
    assert [len(e.hashes) for e in events if isinstance(e, Stored)] == [2, 3, 1]
    assert [(s.token_id, s.finish_reason) for s in sampled] == [(1000, None), (1001, "length")]
    assert [step.work.prefill_tokens for step in steps] == [10, 10, 5, 0]
    assert (steps[-1].work.decode_sequences, steps[-1].work.context_tokens) == (1, 26)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine = core()
    for _ in range(2):
        asked = request(range(8))
        engine.add(asked)
        events, _, _ = run(engine)
    assert asked.cached_tokens == 4  # not 8: the second block is computed again, and is a copy
    assert [len(e.hashes) for e in events if isinstance(e, Stored)] == [1]
    assert sorted(engine.copies().values()) == [1, 2]


def test_requests_of_one_step_share_what_the_first_of_them_computes() -> None:
    engine = core()
    first, second = request(range(9)), request([*range(8), 99])
    engine.add(first)
    engine.add(second)
    step = engine.schedule()
    assert step is not None
    assert [count for _, count in step.scheduled] == [9, 1]
    assert second.cached_tokens == 8


def test_only_the_driver_of_the_cache_manager_computes_the_last_sampled_token() -> None:
    for computes, blocks in ((False, 1), (True, 2)):
        engine = core(computes_last_token=computes)
        engine.add(request(range(6), max_tokens=2))
        events, sampled, _ = run(engine)
        assert len(sampled) == 2
        assert sum(len(e.hashes) for e in events if isinstance(e, Stored)) == blocks


def test_a_reset_is_published_with_the_next_step_and_refused_while_blocks_are_used() -> None:
    engine = core()
    engine.add(request(range(8), max_tokens=2))
    step = engine.schedule()
    assert step is not None
    assert not engine.reset()
    engine.complete(step)
    run(engine)
    assert engine.reset()
    assert engine.schedule() is None  # nothing to compute: nothing to publish it with
    engine.add(request(range(8)))
    events, _, _ = run(engine)
    assert isinstance(events[0], Cleared)
    assert isinstance(events[1], Stored)


def test_the_last_running_request_is_preempted_and_finishes_later_from_the_cache() -> None:
    engine = core(num_blocks=8)
    first, second = (
        request(range(11), max_tokens=12, name="first"),
        request(range(100, 111), max_tokens=6, name="second"),
    )
    engine.add(first)
    engine.add(second)
    _, sampled, _ = run(engine)
    assert engine.counters.preemptions == 1
    assert [s.request.id for s in sampled if s.finish_reason] == ["first", "second"]
    assert (len(first.output), len(second.output)) == (12, 6)
    assert second.output == [1000 + i for i in range(6)]  # nothing lost, nothing twice
    assert second.cached_tokens == 0  # as first admitted, whatever the cache held when it came back


def test_0_32_admits_what_fits_whole_and_0_10_what_fits_for_a_chunk() -> None:
    for version, admitted in ((PoolVersion.V0_10, 2), (PoolVersion.V0_32, 1)):
        engine = core(num_blocks=12, max_num_batched_tokens=28, version=version)
        engine.add(request(range(20), max_tokens=2))
        engine.add(request(range(100, 140)))
        step = engine.schedule()
        assert step is not None
        assert len(step.scheduled) == admitted


def test_no_more_than_max_num_seqs_run_and_no_more_than_max_waiting_wait() -> None:
    engine = core(max_num_seqs=2, max_waiting=3)
    for _ in range(3):
        engine.add(request(range(5)))
    with pytest.raises(EngineFull, match="3 requests are waiting"):
        engine.add(request(range(5)))
    step = engine.schedule()
    assert step is not None
    assert (engine.running, engine.waiting) == (2, 1)


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = core(num_blocks=4, max_model_len=100)
    engine.add(request(range(11), max_tokens=1))
    for prompt, max_tokens in ((range(12), 1), (range(0), 1), (range(4), 0)):
        with pytest.raises(PromptTooLong):
            engine.add(request(prompt, max_tokens))


def test_a_stop_token_ends_an_answer() -> None:
    engine = core()
    asked = EngineRequest("r", [1, 2, 3], 10, PrefixChain(), lambda i: 1000 + i, stop_ids={1002})
    engine.add(asked)
    _, sampled, _ = run(engine)
    assert [s.finish_reason for s in sampled] == [None, None, "stop"]


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 12), st.sampled_from("aaaasxr"))),
    version=st.sampled_from(list(PoolVersion)),
    chunk=st.integers(3, 20),
)
def test_applying_every_event_gives_the_engines_cache(
    steps: list[tuple[int, int, int, str]], version: PoolVersion, chunk: int
) -> None:
    engine = core(num_blocks=14, version=version, max_num_batched_tokens=chunk, max_num_seqs=4)
    index: Counter[int] = Counter()
    asked: list[EngineRequest] = []
    for family, length, max_tokens, what in [*steps, (0, 1, 1, "r")]:
        if what == "x" and asked:
            engine.abort(asked[length % len(asked)])
        elif what == "r":
            engine.reset()
        else:
            asked.append(request([family * 1000 + i for i in range(length)], max_tokens))
            engine.add(asked[-1])
        step = engine.schedule()
        if step is None:
            continue
        if what == "s":
            engine.abort(step.scheduled[0][0])  # while the step is under way
        apply(index, engine.complete(step).events)
        assert +index == Counter(engine.copies())
    while step := engine.schedule():
        apply(index, engine.complete(step).events)
    apply(index, engine.take_events())
    assert +index == Counter(engine.copies())
    assert all(r.gone for r in asked)
    assert (engine.running, engine.waiting, engine.usage) == (0, 0, 0.0)
