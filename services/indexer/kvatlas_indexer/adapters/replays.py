"""Performs the replays the core asks for: at most one per engine, a new one in place of the old."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.replay_client import ReplayClient, ReplayOutcome
from kvatlas_indexer.core.index import Command, Replay, StopReplay
from kvatlas_indexer.core.stream import ReplayEnd

_ENDS = {
    ReplayOutcome.COMPLETE: ReplayEnd.COMPLETE,
    ReplayOutcome.REFUSED: ReplayEnd.REFUSED,
    ReplayOutcome.TRUNCATED: ReplayEnd.TRUNCATED,
    ReplayOutcome.MALFORMED: ReplayEnd.TRUNCATED,
}


class Replays:
    """`on_batch(engine, seq, payload)` and `on_end(engine, end)` are called in the event loop."""

    def __init__(
        self,
        client: ReplayClient,
        on_batch: Callable[[EngineId, int, bytes], None],
        on_end: Callable[[EngineId, ReplayEnd], None],
    ) -> None:
        self._client = client
        self._on_batch = on_batch
        self._on_end = on_end
        self._tasks: dict[EngineId, asyncio.Task[None]] = {}

    def perform(self, command: Command) -> None:
        previous = self._tasks.pop(command.engine, None)
        if previous is not None:
            previous.cancel()
        if isinstance(command, StopReplay):
            return
        task = asyncio.create_task(self._replay(command, previous), name=f"replay {command.engine}")
        self._tasks[command.engine] = task

    async def close(self) -> None:
        tasks = [*self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _replay(self, command: Replay, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([previous])
        await asyncio.sleep(command.delay_s)

        def hand_on(seq: int, payload: bytes) -> None:
            if self._tasks.get(command.engine) is task:  # not any more what the core waits for
                self._on_batch(command.engine, seq, payload)

        task = asyncio.current_task()
        end = await self._client.replay(command.engine, command.endpoint, command.first_seq, hand_on)
        if self._tasks.get(command.engine) is task:
            del self._tasks[command.engine]
            self._on_end(command.engine, _ENDS[end.outcome])
