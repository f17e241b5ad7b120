"""Work of one step while the step before it is still used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def ahead(items: AsyncGenerator[T, None]) -> AsyncIterator[AsyncIterator[T]]:
    """The same items, or the same error, each made while whoever asks for it works on the one before."""
    made: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue(1)

    async def make() -> None:
        end: Exception | None = None
        try:
            async for item in items:
                await made.put((item,))
        except Exception as error:
            end = error
        await made.put(end)

    async def take() -> AsyncGenerator[T, None]:
        while isinstance(item := await made.get(), tuple):
            yield item[0]
        if item is not None:
            raise item

    making = asyncio.create_task(make())
    async with aclosing(items), aclosing(take()) as taken:
        try:
            yield taken
        finally:
            making.cancel()
            await asyncio.wait([making])  # only then can `items` be closed
