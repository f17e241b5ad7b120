"""What is begun on the spot: over at once, or gone on with by whoever awaits it."""

from __future__ import annotations

import asyncio

import pytest

from kvatlas_router.adapters.asgi import Begun


async def number(waits: list[asyncio.Future[int]]) -> int:
    return sum([await one for one in waits])


def futures(count: int) -> list[asyncio.Future[int]]:
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


async def test_what_waits_for_nothing_is_over_at_once() -> None:
    begun = Begun(number([]))
    assert begun.over
    assert begun.result == 0


async def test_what_waits_goes_on_where_it_is_awaited() -> None:
    waits = futures(3)
    begun = Begun(number(waits))
    assert not begun.over
    waits[0].set_result(1)  # before anybody awaits it
    asyncio.get_running_loop().call_soon(waits[1].set_result, 20)
    asyncio.get_running_loop().call_soon(waits[2].set_result, 300)
    assert await begun == 321


async def test_what_fails_fails_where_it_is_begun_or_awaited() -> None:
    (wait,) = futures(1)
    begun = Begun(number([wait]))
    wait.set_exception(OSError("late"))
    with pytest.raises(OSError, match="late"):
        await begun
    with pytest.raises(OSError, match="late"):
        Begun(number([wait]))


async def test_who_is_cancelled_cancels_what_was_begun() -> None:
    ended: list[str] = []

    async def careful(wait: asyncio.Future[None]) -> None:
        try:
            await wait
        finally:
            ended.append("cleaned up")

    wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    begun = Begun(careful(wait))

    async def going_on() -> None:
        await begun

    task = asyncio.create_task(going_on())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cleaned up"]
    assert wait.cancelled()
