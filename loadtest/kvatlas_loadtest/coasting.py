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

from collections import defaultdict
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
        self.context = 0  # tokens the decoded requests attend to in the last step done
        self._running = running
        self._pool = pool
        self._size = block_size
        self._store = store
        self._watched = watched
        self._queue = queue
        self._over = False
        self._started: dict[EngineRequest, int] = {}  # tokens computed when the coast began
        self._growing: dict[int, list[tuple[int, EngineRequest]]] = defaultdict(list)  # by step, modulo the block size
        self._filling: dict[int, list[tuple[int, EngineRequest]]] = defaultdict(list)
        self._ending: dict[int, list[EngineRequest]] = defaultdict(list)
        for place, request in enumerate(running):
            computed = request.computed
            self.context += computed
            self._started[request] = computed
            self._growing[(1 - computed) % block_size].append((place, request))
            self._filling[-computed % block_size].append((place, request))
            self._ending[request.max_tokens - len(request.tokens) + len(request.prompt)].append(request)

    @property
    def steps_to_end(self) -> int:
        """Steps until the next request finishes."""
        return min(self._ending, default=self.steps) - self.steps

    def can_step(self) -> bool:
        if self._over or not self._running:
            return False
        at = (self.steps + 1) % self._size
        if len(self._growing.get(at, ())) > self._pool.free_blocks:
            return False
        if self._watched:
            for _, request in self._filling.get(at, ()):
                self._sample_up_to(request, self._started[request] + self.steps + 1)
                if request.hashes[request.named] in self._watched:
                    return False
        return True

    def step(self) -> Sequence[EngineRequest]:
        """One step, if `can_step`; returns the requests it ends."""
        self.steps += 1
        self.tokens += self.decoding
        self.context += self.decoding
        at = self.steps % self._size
        growing, filling = self._growing.get(at), self._filling.get(at)
        if growing and filling:
            both = [(place, False, request) for place, request in growing]
            both += [(place, True, request) for place, request in filling]
            for _, full, request in sorted(both, key=lambda each: each[:2]):
                self._fill(request) if full else self._grow(request)
        elif growing:
            for _, request in growing:
                self._grow(request)
        elif filling:
            for _, request in filling:
                self._fill(request)
        ending = self._ending.pop(self.steps, None)
        return self._end(ending) if ending else ()

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
        made = len(request.tokens) - len(request.prompt)
        more = tokens - len(request.tokens)
        if more > 0:
            request.tokens.extend(map(request.sample, range(made, made + more)))
            request.name_new_blocks(self._size)

    def _end(self, ending: Sequence[EngineRequest]) -> Sequence[EngineRequest]:
        """As the scheduler completes them: in its order, their blocks released one request after the other."""
        for request in ending:
            started = self._started.pop(request)
            for boundary, first in ((self._growing, 1), (self._filling, 0)):
                at = (first - started) % self._size
                boundary[at] = [each for each in boundary[at] if each[1] is not request]
            request.computed = started + self.steps
            self._sample_up_to(request, request.computed + 1)
            request.stopped = request.gone = True
            self.context -= request.computed
            self._pool.release(request.blocks)
            request.blocks = []
            self._running.remove(request)
        self.finished += len(ending)
        self.decoding -= len(ending)
        self._over = self._queue
        return ending
