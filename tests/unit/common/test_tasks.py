"""Asyncio tasks are counted in the loop that asks; without one there are none."""

from __future__ import annotations

import asyncio

from kvatlas_common.tasks import running_tasks


async def test_tasks_of_this_loop_are_counted() -> None:
    before = running_tasks()
    task = asyncio.create_task(asyncio.Event().wait())
    assert running_tasks() == before + 1
    task.cancel()
    await asyncio.wait([task])
    assert running_tasks() == before


def test_without_a_loop_there_are_none() -> None:
    assert running_tasks() == 0
