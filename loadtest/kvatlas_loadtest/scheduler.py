"""Continuous batching over a block pool: what one engine computes in each step, and what it publishes.

After vLLM's `v1/core/sched/scheduler.py` (0.10.0 and 0.32), first come first served, synchronous steps:
- running requests go first, each computing what it has not (a chunk of its prompt, or one token), within
  `max_num_batched_tokens`; where the pool has no block left, the last of the running requests is *preempted*: its
  blocks are released and it waits again, at the front, with the tokens it has made;
- then, unless somebody was preempted, waiting requests are admitted, up to `max_num_seqs`, each taking the leading
  blocks found in the cache, at most floor((tokens - 1) / block_size): the last token is always computed. 0.32 admits a
  request only when all of its tokens would fit, 0.10 when its first chunk does;
- blocks that become full get their hashes when the step is *scheduled*, so requests of the same step share them;
- events are handed out when the step is *complete*: a reset shows with the next step.

No I/O, no clock: `schedule()` says what the step computes, whoever drives the engine lets that much time pass, and
`complete()` says what came of it. `coasting.CoastingCore` does the same in a fraction of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvatlas_loadtest.block_pool import BlockPool, PoolVersion
from kvatlas_loadtest.kv_events import KvEvent, Stored
from kvatlas_loadtest.sequences import EngineRequest, HashChain
from kvatlas_loadtest.time_model import StepWork

__all__ = [
    "Counters",
    "EngineCore",
    "EngineFull",
    "EngineLimits",
    "EngineRequest",
    "HashChain",
    "PromptTooLong",
    "Sampled",
    "Step",
    "StepResult",
    "work_of",
]


class EngineFull(Exception):
    """The waiting queue is at `max_waiting`."""


class PromptTooLong(ValueError):
    """Prompt and answer would not fit: into `max_model_len`, or into the whole pool."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one engine, named after vLLM's options. `max_waiting` bounds the queue: a request beyond is refused.

    `computes_last_token`: the last sampled token is computed too (a driver of vLLM's cache manager that runs a step
    more; the engines themselves never do).
    """

    num_blocks: int = 4096
    block_size: int = 16
    version: PoolVersion = PoolVersion.V0_32
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int = 32768
    max_waiting: int = 10_000
    computes_last_token: bool = False

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer one request may have: what the pool holds bounds it too."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)


@dataclass(frozen=True, slots=True)
class Step:
    """A scheduled step: how many tokens of which request, and how much work that is."""

    scheduled: Sequence[tuple[EngineRequest, int]]
    work: StepWork


class Sampled(NamedTuple):
    """One token of one request; `finish_reason` (`stop` or `length`) when it is its last."""

    request: EngineRequest
    token_id: int
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a completed step brought: `events` in the order they happened, for one batch."""

    sampled: Sequence[Sampled]
    events: Sequence[KvEvent]


@dataclass(slots=True)
class Counters:
    """Totals since the engine started, in tokens unless said otherwise."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0  # requests
    finished: int = 0  # requests


class EngineCore:
    """One engine: add requests, then `schedule` and `complete` steps until `schedule` has nothing to do."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.counters = Counters()
        self._events: list[KvEvent] = []
        self._pool = BlockPool(limits.num_blocks, limits.version, self._events)
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def usage(self) -> float:
        return self._pool.usage

    def copies(self) -> dict[int, int]:
        """Block key -> copies in the cache now: what an index that applied every event must equal."""
        return self._pool.copies()

    def arrivals(self) -> dict[int, int]:
        """Block key -> a number that changes when the block has been away in between."""
        return self._pool.arrivals()

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises `EngineFull`, `PromptTooLong`."""
        if len(self._waiting) >= self.limits.max_waiting:
            raise EngineFull(f"{len(self._waiting)} requests are waiting")
        wanted = len(request.prompt) + request.max_tokens
        if wanted > self.limits.longest or not request.prompt or request.max_tokens < 1:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} output tokens: "
                f"at least one of each, and {self.limits.longest} together, are possible"
            )
        request.name_new_blocks(self.limits.block_size)
        self._waiting.append(request)

    def abort(self, request: EngineRequest) -> None:
        """Ends a request at once, wherever it is; a step under way brings nothing more for it."""
        if request.gone:
            return
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._retire(request)

    def reset(self) -> bool:
        """Forgets the prefix cache; refused (False) while a request holds blocks. Published with the next step."""
        return self._pool.reset()

    def schedule(self) -> Step | None:
        """The next step; None when there is nothing to compute."""
        scheduled, budget, preempted = self._schedule_running(self.limits.max_num_batched_tokens)
        if not preempted:
            scheduled += self._admit(budget)
        return Step(scheduled, work_of(scheduled)) if scheduled else None

    def complete(self, step: Step) -> StepResult:
        """The step has been computed: its tokens are sampled, its events come out."""
        sampled: list[Sampled] = []
        for request, _ in step.scheduled:
            if request.gone or request.computed < len(request.tokens):
                continue  # aborted meanwhile, or a chunk of a longer prompt
            if not request.stopped:
                sampled.append(self._sample(request))
            if request.stopped and (not self.limits.computes_last_token or request.computed == len(request.tokens)):
                self._running.remove(request)
                self.counters.finished += 1
                self._retire(request)
        return StepResult(sampled, self.take_events())

    def take_events(self) -> Sequence[KvEvent]:
        """The events since the last batch. `complete` takes them; between steps only a reset leaves any."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def _schedule_running(self, budget: int) -> tuple[list[tuple[EngineRequest, int]], int, bool]:
        scheduled: list[tuple[EngineRequest, int]] = []
        preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            request = self._running[index]
            count = min(len(request.tokens) - request.computed, budget)
            while not self._grow(request, count):
                victim = self._running.pop()
                self._preempt(victim)
                preempted = True
                if victim is request:
                    return scheduled, budget, preempted
            scheduled.append((request, count))
            budget -= count
            index += 1
        return scheduled, budget, preempted

    def _admit(self, budget: int) -> list[tuple[EngineRequest, int]]:
        scheduled: list[tuple[EngineRequest, int]] = []
        size = self.limits.block_size
        while self._waiting and budget > 0 and len(self._running) < self.limits.max_num_seqs:
            request = self._waiting[0]
            hits = self._fits(request, budget)
            if hits is None:
                break
            cached = len(hits) * size
            count = min(len(request.tokens) - cached, budget)
            self._waiting.popleft()
            self._running.append(request)
            self._pool.share(hits)
            request.blocks, request.computed, request.named = hits, cached, len(hits)
            if request.cached_tokens is None:
                request.cached_tokens = cached
                self.counters.prompt_tokens += len(request.prompt)
                self.counters.cache_queries += len(request.tokens)
                self.counters.cache_hits += cached
            self._grow(request, count)
            scheduled.append((request, count))
            budget -= count
        return scheduled

    def _fits(self, request: EngineRequest, budget: int = 1) -> list[int] | None:
        """The cached blocks a waiting request would begin with; None if it cannot be admitted now."""
        size = self.limits.block_size
        hits = self._pool.find(request.hashes[: (len(request.tokens) - 1) // size])
        must_fit = len(request.tokens)
        if self.limits.version is PoolVersion.V0_10:
            must_fit = min(must_fit, len(hits) * size + budget)
        needed = -(-must_fit // size) - len(hits) + self._pool.unused(hits)
        return hits if needed <= self._pool.free_blocks else None

    def _grow(self, request: EngineRequest, count: int) -> bool:
        """Gives `request` the blocks its next `count` tokens need and names those that become full, or does nothing."""
        size = self.limits.block_size
        end = request.computed + count
        missing = -(-end // size) - len(request.blocks)
        if missing > self._pool.free_blocks:
            return False
        if missing > 0:
            request.blocks += self._pool.allocate(missing)
        request.computed = end
        full = end // size
        if full > request.named:
            self._store(request, full)
        return True

    def _store(self, request: EngineRequest, full: int) -> None:
        size, first = self.limits.block_size, request.named
        hashes = request.hashes[first:full]
        self._pool.name(request.blocks[first:full], hashes)
        extra_keys = [request.extra_keys] * len(hashes)
        if first == 0:
            extra_keys[0] = request.first_extra_keys
        parent = request.hashes[first - 1] if first else None
        token_ids = request.tokens[first * size : full * size]
        self._events.append(Stored(hashes, parent, token_ids, extra_keys, request.lora_name))
        request.named = full

    def _sample(self, request: EngineRequest) -> Sampled:
        tokens = request.tokens
        made = len(tokens) - len(request.prompt)
        token_id = request.sample(made)
        tokens.append(token_id)
        if len(tokens) % self.limits.block_size == 0:
            request.name_new_blocks(self.limits.block_size)
        self.counters.generated_tokens += 1
        if request.stop_ids and token_id in request.stop_ids:
            reason: str | None = "stop"
        else:
            reason = "length" if made + 1 >= request.max_tokens else None
        request.stopped = reason is not None
        return Sampled(request, token_id, reason)

    def _preempt(self, request: EngineRequest) -> None:
        self.counters.preemptions += 1
        self._pool.release(request.blocks)
        request.blocks, request.computed, request.named = [], 0, 0
        self._waiting.appendleft(request)

    def _retire(self, request: EngineRequest) -> None:
        request.gone = True
        self._pool.release(request.blocks)
        request.blocks = []


def work_of(scheduled: Sequence[tuple[EngineRequest, int]]) -> StepWork:
    prefill = decoding = context = 0
    for request, count in scheduled:
        if count == 1 and request.computed > len(request.prompt):
            decoding += 1
            context += request.computed
        else:
            prefill += count
    return StepWork(prefill, decoding, context)
