"""A dialled engine's connection, as it comes and goes: told at every change, and of nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
import zmq

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.zmq_sockets import Context, new_context
from kvatlas_indexer.adapters.zmq_source import ZmqSource, ZmqSourceOptions

DEADLINE_S = 30.0  # far more than is needed: machines are shared
ENGINE = EngineId("10.0.0.1:8000")
OPTIONS = ZmqSourceOptions(reconnect_s=0.02, reconnect_max_s=0.1)


@pytest.fixture
def context() -> Iterator[Context]:
    context = new_context()
    yield context
    context.term()  # returns only when every socket is closed, the monitors too


class Told:
    def __init__(self) -> None:
        self.changes: list[tuple[EngineId, bool]] = []
        self._came = asyncio.Event()

    def __call__(self, engine: EngineId, up: bool) -> None:
        self.changes.append((engine, up))
        self._came.set()

    async def until(self, *wanted: bool) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.changes != [(ENGINE, up) for up in wanted]:
                self._came.clear()
                await self._came.wait()


async def test_a_connection_is_told_as_it_comes_and_goes_and_comes_back(context: Context) -> None:
    told = Told()
    source = ZmqSource(context, list, lambda origin, frames: None, OPTIONS, on_connection=told)
    engine = context.socket(zmq.PUB)
    engine.bind("tcp://127.0.0.1:*")
    endpoint = engine.get_string(zmq.LAST_ENDPOINT)
    try:
        source.set_dialled({ENGINE: endpoint})
        await told.until(False, True)
        source.set_dialled({ENGINE: endpoint})
        engine.close(linger=0)
        await told.until(False, True, False)
        engine = context.socket(zmq.PUB)
        while not _bound(engine, endpoint):
            await asyncio.sleep(0.01)  # libzmq lets go of a port in a thread of its own
        await told.until(False, True, False, True)
    finally:
        engine.close(linger=0)
        source.close()


def _bound(socket: zmq.Socket[bytes], endpoint: str) -> bool:
    with contextlib.suppress(zmq.ZMQError):
        socket.bind(endpoint)
        return True
    return False


async def test_what_answers_but_is_no_publisher_is_no_connection(context: Context) -> None:
    knocks = asyncio.Semaphore(0)

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read(1000)
        writer.close()
        knocks.release()

    told = Told()
    source = ZmqSource(context, list, lambda origin, frames: None, OPTIONS, on_connection=told)
    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        source.set_dialled({ENGINE: f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"})
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(3):
                await knocks.acquire()
        source.close()
    assert told.changes == [(ENGINE, False)]
