"""Pieces of a body written at once are what `send` would have written; what it would wait for is left to it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from kvatlas_common.http11 import BODY_PIECES, FastHttp11, Write

CHUNKED: list[tuple[bytes, bytes]] = []
SIZED = [(b"content-length", b"9")]


class Client(asyncio.Transport):
    """What it has been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.got = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.got += bytes(data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Served:
    """A request at a server, and how it may be answered."""

    def __init__(self, method: str = "GET") -> None:
        self.client = Client()
        self.apps: list[tuple[dict[str, Any], Any]] = []
        self.arrived = asyncio.Event()
        config = Config(self._app, http=FastHttp11, interface="asgi3", lifespan="off", log_config=None)
        config.load()
        self.server = FastHttp11(config, ServerState(), {})
        self.server.connection_made(self.client)
        self.server.data_received(f"{method} / HTTP/1.1\r\nhost: x\r\n\r\n".encode())

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.apps.append((scope, send))
        self.arrived.set()
        await asyncio.Event().wait()

    async def begun(self, headers: list[tuple[bytes, bytes]]) -> tuple[Write, Any]:
        async with asyncio.timeout(30):
            await self.arrived.wait()
        scope, send = self.apps[0]
        write: Write = scope["extensions"][BODY_PIECES]
        assert not write(b"too early")
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.client.got = b""
        return write, send

    async def close(self) -> None:
        for task in self.server.tasks:
            task.cancel()
        await asyncio.gather(*self.server.tasks, return_exceptions=True)


async def sent(pieces: list[bytes], *, at_once: bool) -> bytes:
    served = Served()
    write, send = await served.begun(CHUNKED)
    for piece in pieces:
        if not (at_once and write(piece)):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    assert not write(b"too late")
    await served.close()
    return served.client.got


async def test_what_is_written_at_once_is_what_would_have_been_sent() -> None:
    chance = random.Random(1)
    pieces = [chance.randbytes(size) for size in (0, 1, 15, 16, 17, 0, 255, 4096, 70_000)]
    assert await sent(pieces, at_once=True) == await sent(pieces, at_once=False)


@pytest.mark.parametrize(("method", "headers"), [("HEAD", CHUNKED), ("GET", SIZED)])
async def test_what_is_not_in_chunks_is_left_to_send(method: str, headers: list[tuple[bytes, bytes]]) -> None:
    served = Served(method)
    write, _ = await served.begun(headers)
    assert not write(b"piece")
    assert served.client.got == b""
    await served.close()


async def test_a_client_that_takes_no_more_is_waited_for_by_send() -> None:
    served = Served()
    write, _ = await served.begun(CHUNKED)
    served.server.pause_writing()
    assert not write(b"piece")
    served.server.resume_writing()
    assert write(b"piece")
    assert served.client.got == b"5\r\npiece\r\n"
    await served.close()


async def test_nothing_is_written_to_a_client_that_is_gone() -> None:
    served = Served()
    write, _ = await served.begun(CHUNKED)
    served.server.connection_lost(None)
    assert not write(b"piece")
    assert served.client.got == b""
    await served.close()
