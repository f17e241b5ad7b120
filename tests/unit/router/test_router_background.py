"""A task that is stopped has ended; who waits for that can be stopped too."""

from __future__ import annotations

import asyncio

from kvatlas_router.adapters import background


async def test_a_stopped_task_has_ended() -> None:
    task = background.start(asyncio.sleep(1000), "sleeping")
    await background.stop(task)
    assert task.cancelled()
    await background.stop(task)


async def test_who_stops_one_may_be_stopped_meanwhile() -> None:
    async def ends_slowly() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.01)

    async def forever() -> None:
        while True:
            inner = background.start(ends_slowly(), "inner")
            await asyncio.sleep(0)
            stopping.set()
            await background.stop(inner)

    stopping = asyncio.Event()
    outer = background.start(forever(), "outer")
    await stopping.wait()
    async with asyncio.timeout(30):
        await background.stop(outer)
    assert outer.cancelled()
