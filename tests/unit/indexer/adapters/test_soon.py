from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from kvatlas_indexer.adapters.soon import Soon


@pytest.mark.parametrize("loop_of", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_is_done_once_for_all_that_asked_and_at_once_if_not_lately(
    loop_of: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=loop_of) as runner:
        runner.run(_done_once())


async def _done_once() -> None:
    loop, done, came = asyncio.get_running_loop(), asyncio.Event(), []

    def act() -> None:
        came.append(loop.time())
        done.set()

    soon = Soon(act, gap_s=0.05)
    for delay_s in (30.0, 0.0, 0.0, 20.0):
        soon.within(delay_s)
    async with asyncio.timeout(30):
        await done.wait()
        done.clear()
        soon.within(0.0)
        await done.wait()
    assert len(came) == 2
    assert came[1] - came[0] > 0.045  # uvloop tells the time in milliseconds


async def test_is_not_done_after_it_was_stopped() -> None:
    done: list[str] = []
    soon = Soon(lambda: done.append("done"), gap_s=0.0)
    soon.within(0.0)
    soon.stop()
    soon.within(0.0)
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, later.set)
    await later.wait()
    assert not done
