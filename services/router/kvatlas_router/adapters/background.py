"""Tasks that run as long as their owner: one that ends by a defect says so at once, not when the process exits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

log = logging.getLogger(__name__)


def start(job: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(job, name=name)
    task.add_done_callback(_ended)
    return task


async def stop(task: asyncio.Task[None]) -> None:
    """Cancels it and waits for its end; a defect was logged when it ended by it. Who waits may be cancelled itself."""
    task.cancel()
    await asyncio.wait([task])


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task ended", extra={"task": task.get_name()}, exc_info=error)
