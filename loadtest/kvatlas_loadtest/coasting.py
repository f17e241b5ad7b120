"""The scheduler's steps, without looking at every request in every step: for who simulates hours in minutes.

A request that decodes computes one token a step, and what that does to the cache can be told beforehand: it needs a
block whenever it has filled one, and names a block whenever one is full. So decoding requests are sorted by how full
their last block is, and a step looks only at those of which a block begins or ends; where they stand is written back
when somebody wants to know. Requests that wait are not looked at either while the first of them does not fit: nothing
but a release, or a block it would hit, can change that.

All else is the scheduler's own code, and the result is exactly its: the same events in the same order, the same blocks,
the same tokens (a property test compares them step by step). Where a step would preempt somebody, or a request may end
on a stop token, it is left to the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvatlas_loadtest.block_pool import BlockPool, PoolVersion
from kvatlas_loadtest.kv_events import BlockHash, KvEvent
from kvatlas_loadtest.scheduler import EngineCore, EngineLimits, EngineRequest, Step, work_of
from kvatlas_loadtest.time_model import StepWork


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step that is done: `began` have their first token, `ended` their last."""

    work: StepWork
    began: Sequence[EngineRequest]
    ended: Sequence[EngineRequest]
    events: Sequence[KvEvent]


class CoastingCore(EngineCore):
    """An engine that is told to do whole steps. It may be scheduled step by step as well, at any time."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits)
        self._decoders: _Decoders | None = None
        self._guests: list[EngineRequest] = []  # running, and still computing their prompts: behind all decoders
        self._stuck = False  # the first of those waiting does not fit
        self._watched: frozenset[BlockHash] = frozenset()  # blocks that would change that
        self._may_stop = limits.computes_last_token

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        self._may_stop = self._may_stop or bool(request.stop_ids)

    def abort(self, request: EngineRequest) -> None:
        self._land()
        super().abort(request)

    def reset(self) -> bool:
        self._land()
        return super().reset()

    def schedule(self) -> Step | None:
        self._land()
        return super().schedule()

    def step(self) -> Stepped | None:
        """The next step, from its beginning to its end; None when there is nothing to compute."""
        if self._may_stop:
            return self._step_by_step()
        if self._decoders is None:
            self._take_off()
        assert self._decoders is not None
        guests = self._chunks(self.limits.max_num_batched_tokens - self._decoders.count)
        if guests is None:
            return self._step_by_step()
        decoders = self._decoders
        decoders.step(self)
        for request, count in guests:
            self._grow(request, count)
        budget = self.limits.max_num_batched_tokens - decoders.count - sum(count for _, count in guests)
        if self._waiting and budget > 0 and not self._stuck:
            guests += self._admit(budget)
        if not guests and not decoders.count:
            return None
        rest = work_of(guests)
        work = StepWork(
            rest.prefill_tokens,
            rest.decode_sequences + decoders.count,
            rest.context_tokens + decoders.context,
        )
        self.counters.generated_tokens += decoders.count
        ended = decoders.end()
        for request in ended:
            self._finish(request)
        began, more = self._complete_guests(guests)
        return Stepped(work, began, [*ended, *more] if more else ended, self.take_events())

    def _chunks(self, budget: int) -> list[tuple[EngineRequest, int]] | None:
        """What those still in their prompts compute next; None if somebody would be preempted."""
        assert self._decoders is not None
        if budget <= 0:
            return None
        chunks: list[tuple[EngineRequest, int]] = []
        needed = self._decoders.blocks_needed()
        for request in self._guests:
            count = min(len(request.tokens) - request.computed, budget)
            if count <= 0:
                return None
            needed += -(-(request.computed + count) // self.limits.block_size) - len(request.blocks)
            chunks.append((request, count))
            budget -= count
        return chunks if needed <= self._pool.free_blocks else None

    def _admit(self, budget: int) -> list[tuple[EngineRequest, int]]:
        admitted = super()._admit(budget)
        left = budget - sum(count for _, count in admitted)
        room = left > 0 and len(self._running) < self.limits.max_num_seqs
        if self._waiting and room and self.limits.version is not PoolVersion.V0_10:
            # In 0.10 an eviction may shorten its hits, and with them what its first chunk needs.
            self._stuck, self._watched = True, frozenset(self._waiting[0].hashes)
        return admitted

    def _store(self, request: EngineRequest, full: int) -> None:
        if self._stuck and not self._watched.isdisjoint(request.hashes[request.named : full]):
            self._stuck = False
        super()._store(request, full)

    def _retire(self, request: EngineRequest) -> None:
        self._stuck = False
        super()._retire(request)

    def _preempt(self, request: EngineRequest) -> None:
        self._stuck = False
        super()._preempt(request)

    def _finish(self, request: EngineRequest) -> None:
        request.stopped = True
        self._running.remove(request)
        self.counters.finished += 1
        self._retire(request)

    def _complete_guests(
        self, guests: Iterable[tuple[EngineRequest, int]]
    ) -> tuple[list[EngineRequest], list[EngineRequest]]:
        """Those that got their first token, and those of them for which it was the last."""
        assert self._decoders is not None
        began: list[EngineRequest] = []
        ended: list[EngineRequest] = []
        self._guests = []
        for request, _ in guests:
            if request.computed < len(request.tokens):
                self._guests.append(request)
                continue
            self._sample(request)
            if len(request.tokens) - len(request.prompt) == 1:
                began.append(request)
            if request.stopped:
                self._finish(request)
                ended.append(request)
            else:
                self._decoders.join(request)
        return began, ended

    def _take_off(self) -> None:
        decoding = [r for r in self._running if r.is_decoding]
        self._guests = [r for r in self._running if not r.is_decoding]
        self._decoders = _Decoders(self._pool, self.limits.block_size)
        for request in decoding:
            self._decoders.join(request)

    def _land(self) -> None:
        if self._decoders is not None:
            self._decoders.settle()
            self._decoders, self._guests, self._stuck = None, [], False

    def _step_by_step(self) -> Stepped | None:
        step = self.schedule()
        if step is None:
            return None
        result = self.complete(step)
        sampled = [s.request for s in result.sampled]
        began = [request for request in sampled if len(request.tokens) - len(request.prompt) == 1]
        ended = [s.request for s in result.sampled if s.finish_reason is not None]
        return Stepped(step.work, began, ended, result.events)


class _Decoders:
    """Requests that decode, in the scheduler's order. `steps` counts from the beginning of the flight."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.context = 0  # tokens they attended to in the last step
        self._pool = pool
        self._size = block_size
        self._steps = 0
        self._before: dict[EngineRequest, int] = {}  # tokens computed, were it counted from step 0
        self._by_phase: dict[int, list[EngineRequest]] = {}  # `_before` modulo the block size
        self._ends: dict[int, list[EngineRequest]] = {}  # by the step at which they finish

    @property
    def count(self) -> int:
        return len(self._before)

    def join(self, request: EngineRequest) -> None:
        before = request.computed - self._steps
        self._before[request] = before
        self.context += request.computed
        self._by_phase.setdefault(before % self._size, []).append(request)
        self._ends.setdefault(request.max_tokens + len(request.prompt) - 1 - before, []).append(request)

    def blocks_needed(self) -> int:
        """By the next step."""
        return len(self._by_phase.get(-self._steps % self._size, ()))

    def step(self, core: CoastingCore) -> None:
        """Computes a token of each: begins blocks and names full ones, in the scheduler's order."""
        self._steps += 1
        self.context += self.count
        growing = self._by_phase.get((1 - self._steps) % self._size)
        filling = self._by_phase.get(-self._steps % self._size)
        if growing and filling:
            grow, fill = set(growing), set(filling)
            for request in self._before:
                if request in grow:
                    request.blocks += self._pool.allocate(1)
                if request in fill:
                    self._fill(request, core)
        elif growing:
            for request in growing:
                request.blocks += self._pool.allocate(1)
        elif filling:
            for request in filling:
                self._fill(request, core)

    def end(self) -> Sequence[EngineRequest]:
        """Those whose last token this step has brought; they are decoders no more."""
        ended = self._ends.pop(self._steps, ())
        for request in ended:
            before = self._before.pop(request)
            self._by_phase[before % self._size].remove(request)
            request.computed = before + self._steps
            self._sample_up_to(request, request.computed + 1)
            self.context -= request.computed
        return ended

    def settle(self) -> None:
        """Writes back where they stand."""
        for request, before in self._before.items():
            request.computed = before + self._steps
            self._sample_up_to(request, request.computed + 1)

    def _fill(self, request: EngineRequest, core: CoastingCore) -> None:
        self._sample_up_to(request, self._before[request] + self._steps)
        core._store(request, request.named + 1)

    def _sample_up_to(self, request: EngineRequest, tokens: int) -> None:
        listed = request.tokens
        before = len(listed)
        if tokens > before:
            made = before - len(request.prompt)
            listed.extend(map(request.sample, range(made, made + tokens - before)))
            if tokens // self._size > len(request.hashes):
                request.name_new_blocks(self._size)
