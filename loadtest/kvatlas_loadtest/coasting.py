"""Steps in which an engine only decodes, without looking at every request in every step.

While nobody is admitted, preempted or computing a prompt, every running request computes one token a step, and what
that does to the cache can be told beforehand: a request needs a block whenever it has filled one, and names a block
whenever one is full. So requests are sorted by the step at which that happens next, and a step costs only those it
concerns. The result is exactly that of as many steps of the scheduler: the same events in the same order, the same
blocks, the same tokens (a property test compares them). A coast ends where it might differ:
- the pool has too few blocks left for the next step: somebody would be preempted;
- a request finishes while others wait: one of them may be admitted;
- a block is about to be named that the first of those waiting would hit: it may then fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kvatlas_loadtest.block_pool import BlockPool
from kvatlas_loadtest.kv_events import BlockHash
from kvatlas_loadtest.sequences import EngineRequest


class Coast:
    """`running`: all decoding, in the scheduler's order; finished ones are taken out of it. `store` names a full block.

    `watched`: hashes that may not be named unseen; `queue`: whether anybody waits.
    """

    def __init__(
        self,
        running: list[EngineRequest],
        pool: BlockPool,
        block_size: int,
        store: Callable[[EngineRequest, int], None],
        *,
        watched: Collection[BlockHash],
        queue: bool,
    ) -> None:
        self.steps = 0
        self.tokens = 0
        self.finished = 0
        self.decoding = len(running)
        self._running = running
        self._pool = pool
        self._size = block_size
        self._store = store
        self._watched = watched
        self._queue = queue
        self._over = False
        self._started = {request: request.computed for request in running}  # tokens computed when the coast began
        # tokens the decoded requests attend to in the last step done
        self.context = sum(self._started.values())
        self._by_phase: dict[int, list[EngineRequest]] = {}  # by how many tokens of a block they had
        for request, computed in self._started.items():
            phase = computed % block_size
            if phase in self._by_phase:
                self._by_phase[phase].append(request)
            else:
                self._by_phase[phase] = [request]
        self._first_end = self._next_end()

    def can_step(self) -> bool:
        if self._over or not self._running:
            return False
        step = self.steps + 1
        if len(self._by_phase.get((1 - step) % self._size, ())) > self._pool.free_blocks:
            return False
        if self._watched:
            for request in self._by_phase.get(-step % self._size, ()):
                self._sample_up_to(request, self._started[request] + self.steps + 1)
                if request.hashes[request.named] in self._watched:
                    return False
        return True

    def step(self) -> Sequence[EngineRequest]:
        """One step, if `can_step`; returns the requests it ends."""
        self.steps += 1
        self.tokens += self.decoding
        self.context += self.decoding
        growing = self._by_phase.get((1 - self.steps) % self._size)
        filling = self._by_phase.get(-self.steps % self._size)
        if growing and filling:
            fill = set(filling)
            grow = set(growing)
            for request in self._running:
                if request in grow:
                    self._grow(request)
                if request in fill:
                    self._fill(request)
        elif growing:
            for request in growing:
                self._grow(request)
        elif filling:
            for request in filling:
                self._fill(request)
        return self._end() if self.steps == self._first_end else ()

    def settle(self) -> None:
        """Writes back where the requests stand. The coast is of no use afterwards."""
        self._over = True
        for request, started in self._started.items():
            if not request.gone:
                request.computed = started + self.steps
                self._sample_up_to(request, request.computed + 1)

    def _grow(self, request: EngineRequest) -> None:
        request.blocks += self._pool.allocate(1)

    def _fill(self, request: EngineRequest) -> None:
        self._sample_up_to(request, self._started[request] + self.steps)
        self._store(request, request.named + 1)

    def _sample_up_to(self, request: EngineRequest, tokens: int) -> None:
        listed = request.tokens
        before = len(listed)
        if tokens > before:
            made = before - len(request.prompt)
            listed.extend(map(request.sample, range(made, made + tokens - before)))
            if tokens // self._size > len(request.hashes):
                request.name_new_blocks(self._size)

    def _next_end(self) -> int:
        """The step at which the next request finishes; 0 when there is none."""
        return min((r.max_tokens + len(r.prompt) - started - 1 for r, started in self._started.items()), default=0)

    def _end(self) -> Sequence[EngineRequest]:
        """As the scheduler completes them: in its order, their blocks released one request after the other."""
        ending = [r for r, started in self._started.items() if r.max_tokens + len(r.prompt) - started - 1 == self.steps]
        for request in ending:
            started = self._started.pop(request)
            self._by_phase[started % self._size].remove(request)
            request.computed = started + self.steps
            self._sample_up_to(request, request.computed + 1)
            request.stopped = request.gone = True
            self.context -= request.computed
            self._pool.release(request.blocks)
            request.blocks = []
            self._running.remove(request)
        self.finished += len(ending)
        self.decoding -= len(ending)
        self._first_end = self._next_end()
        self._over = self._queue
        return ending
