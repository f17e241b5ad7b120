"""Items made ahead are the same items, and nothing is left running or open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvatlas_common.tasks import running_tasks
from kvatlas_indexer.adapters.ahead import ahead


class Numbers:
    """Up to `end`, then an error if there is one."""

    def __init__(self, end: int, error: Exception | None = None) -> None:
        self.end, self.error = end, error
        self.made: list[int] = []
        self.closed = False

    async def __call__(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.end):
                await asyncio.sleep(0)
                self.made.append(number)
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("end", [0, 1, 5])
async def test_all_items_in_order(end: int) -> None:
    numbers = Numbers(end)
    async with ahead(numbers()) as items:
        assert [item async for item in items] == list(range(end))
    assert numbers.closed
    assert running_tasks() == 1


async def test_the_next_is_made_while_one_is_worked_on() -> None:
    numbers = Numbers(9)
    async with ahead(numbers()) as items:
        assert await anext(items) == 0
        while len(numbers.made) < 3:  # one waits to be taken, one to be put there
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert numbers.made == [0, 1, 2], "and no more than that"
    assert numbers.closed
    assert running_tasks() == 1


async def test_an_error_comes_after_the_items_before_it() -> None:
    async with ahead(Numbers(2, ValueError("gone"))()) as items:
        assert [await anext(items), await anext(items)] == [0, 1]
        with pytest.raises(ValueError, match="gone"):
            await anext(items)
    assert running_tasks() == 1


async def fails_at_the_first(numbers: Numbers) -> None:
    async with ahead(numbers()) as items:
        async for _ in items:
            raise KeyError


async def test_an_error_of_who_takes_them_ends_it() -> None:
    numbers = Numbers(100)
    with pytest.raises(KeyError):
        await fails_at_the_first(numbers)
    assert numbers.closed
    assert running_tasks() == 1
