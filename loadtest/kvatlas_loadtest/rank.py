"""Lets one simulated engine live in real time: runs its steps, publishes its events, hands out its tokens.

One task per data-parallel rank. Steps follow each other without a pause while there is work; a step's length comes from
the time model, and a machine too slow for it is caught up with, up to `LAG_MAX_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvatlas_loadtest.events import EventEncoder
from kvatlas_loadtest.publisher import EventPublisher
from kvatlas_loadtest.scheduler import EngineCore, EngineRequest
from kvatlas_loadtest.time_model import TimeModel

log = logging.getLogger(__name__)

LAG_MAX_S = 1.0


class Mailbox:
    """Tokens for one HTTP request, whose sequences (choices) all deliver here. Bounded by their `max_tokens`."""

    def __init__(self) -> None:
        self._tokens: list[tuple[EngineRequest, int, str | None]] = []
        self._arrived = asyncio.Event()

    def put(self, request: EngineRequest, token_id: int, finish_reason: str | None) -> None:
        self._tokens.append((request, token_id, finish_reason))
        self._arrived.set()

    async def take(self) -> list[tuple[EngineRequest, int, str | None]]:
        """(request, token, finish reason or None) in the order they were made: all that came since the last call."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._tokens = self._tokens, []
        return taken


class EngineRank:
    """One rank: `core` and what drives it. `publisher` None: its events go nowhere."""

    def __init__(
        self,
        core: EngineCore,
        number: int,
        encoder: EventEncoder,
        publisher: EventPublisher | None,
        *,
        time_model: TimeModel,
        clock: Callable[[], float],
    ) -> None:
        self.core = core
        self.publisher = publisher
        self.number = number
        self._encoder = encoder
        self._time_model = time_model
        self._clock = clock
        self._mailboxes: dict[EngineRequest, Mailbox] = {}  # as many as requests wait and run
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        """Requests here, running and waiting."""
        return self.core.running + self.core.waiting

    def start(self) -> None:
        if self.publisher is not None:
            self.publisher.start()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._report)

    async def stop(self) -> None:
        """Ends the task and the publisher."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self.publisher is not None:
            await self.publisher.close()

    def submit(self, request: EngineRequest, mailbox: Mailbox) -> None:
        """Raises `EngineFull`, `PromptTooLong`."""
        self.core.add(request)
        self._mailboxes[request] = mailbox
        self._work.set()

    def abort(self, request: EngineRequest) -> None:
        """Ends a request; one that has ended already is left alone."""
        if self._mailboxes.pop(request, None) is not None:
            self.core.abort(request)

    def _report(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("rank %d stopped, its requests hang: %r", self.number, error, exc_info=error)

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            step = self.core.schedule()
            if step is None:
                self._work.clear()
                await self._work.wait()
                due = clock()
                continue
            due = max(due, clock() - LAG_MAX_S) + self._time_model.seconds(step.work)
            await asyncio.sleep(max(due - clock(), 0.0))
            result = self.core.complete(step)
            if result.events and self.publisher is not None:
                self.publisher.publish(self._encoder.batch(result.events, self._clock(), self.number))
            for sampled in result.sampled:
                self._deliver(sampled.request, sampled.token_id, sampled.finish_reason)

    def _deliver(self, request: EngineRequest, token_id: int, finish_reason: str | None) -> None:
        mailbox = self._mailboxes.get(request)
        if mailbox is None:
            return
        if finish_reason is not None:
            del self._mailboxes[request]
        mailbox.put(request, token_id, finish_reason)
