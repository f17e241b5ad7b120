"""Connections to engines over real sockets, on both event loops: asyncio's, and uvloop as in production."""

from __future__ import annotations

import asyncio
import random
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from kvatlas_router.adapters.engine_connection import EngineConnection, EngineFailed
from kvatlas_router.adapters.engine_pool import IDLE_MAX_S, EnginePool, origin
from kvatlas_router.core.outliers import Fault
from tests.integration.processes import DEADLINE_S

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Engine = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Runs a test on one event loop."""

    def on_loop(test: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded())

    return on_loop


@asynccontextmanager
async def served(engine: Engine, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await engine(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def pool(clock: Callable[[], float] = lambda: 0.0, connect_s: float = DEADLINE_S) -> AsyncIterator[EnginePool]:
    made = EnginePool(connect_s, clock)
    try:
        yield made
    finally:
        await made.close()


async def polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)


async def answered(connections: EnginePool, url: str) -> tuple[EngineConnection, bytes]:
    body: list[bytes] = []
    connection = await connections.connection(origin(url))
    connection.ask(ASK, b"")
    await connection.head()
    connection.pour(body.append)
    assert await connection.poured()
    connections.release(connection)
    return connection, b"".join(body)


async def refused(connections: EnginePool, url: str) -> str:
    with pytest.raises(EngineFailed) as failed:
        await connections.connection(origin(url))
    assert failed.value.fault is Fault.CONNECT
    return str(failed.value)


def test_a_connection_is_used_again_until_it_was_idle_for_long(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        now = 0.0
        async with served(polite) as port, pool(lambda: now) as connections:
            url = f"http://localhost:{port}"
            first, body = await answered(connections, url)
            assert body == b"ok"
            now += IDLE_MAX_S - 0.1
            again, _ = await answered(connections, url)
            assert again is first
            now += IDLE_MAX_S
            other, _ = await answered(connections, url)
            assert other is not first
            assert not first.reusable

    run(test())


def test_two_at_once_have_one_each(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with served(polite) as port, pool() as connections:
            to = origin(f"http://127.0.0.1:{port}")
            one, two = await connections.connection(to), await connections.connection(to)
            assert one is not two
            connections.release(one)
            assert not one.reusable, "nobody asked it anything, so nobody knows what it would answer"

    run(test())


def test_what_the_engine_closed_is_not_used_again(run: Callable[[Any], None]) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()

    async def test() -> None:
        async with served(once) as port, pool() as connections:
            first, _ = await answered(connections, f"http://127.0.0.1:{port}")
            while first.reusable:
                await asyncio.sleep(0)
            second, body = await answered(connections, f"http://127.0.0.1:{port}")
            assert (second is not first, body) == (True, b"ok")

    run(test())


def test_nobody_listens_or_the_name_is_none(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with served(polite) as port:
            pass
        async with pool() as connections:
            await refused(connections, f"http://127.0.0.1:{port}")
            await refused(connections, "http://no-such-host.invalid:80")
            await refused(connections, "http://" + "a" * 70 + ":80")

    run(test())


def test_a_connection_that_takes_too_long_is_given_up(run: Callable[[Any], None]) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # and never a word of TLS

    async def test() -> None:
        async with served(silent) as port, pool(connect_s=0.1) as connections:
            assert await refused(connections, f"https://127.0.0.1:{port}") == "no connection within 0.1 s"

    run(test())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_is_checked(run: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def test() -> None:
        async with served(polite, tls) as port:
            async with pool() as connections:
                assert "certificate" in await refused(connections, f"https://localhost:{port}")
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            async with pool() as connections:
                first, body = await answered(connections, f"https://localhost:{port}")
                assert body == b"ok"
                assert (await answered(connections, f"https://localhost:{port}"))[0] is first
                await refused(connections, f"https://127.0.0.1:{port}")

    run(test())


@pytest.mark.parametrize("seed", range(3))
def test_what_a_slow_reader_gets_is_what_was_sent(run: Callable[[Any], None], seed: int) -> None:
    rng = random.Random(seed)
    sent = rng.randbytes(3_000_000)

    async def pouring(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        at = 0
        while at < len(sent):
            size = rng.choice([1, 10, 1000, 100_000])
            writer.write(b"%x\r\n%b\r\n" % (len(sent[at : at + size]), sent[at : at + size]))
            await writer.drain()
            at += size
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def test() -> None:
        came = bytearray()

        def sink(data: bytes) -> None:
            came.extend(data)
            if rng.random() < 0.3:
                connection.hold()

        async with served(pouring) as port, pool() as connections:
            connection = await connections.connection(origin(f"http://127.0.0.1:{port}"))
            connection.ask(ASK, b"")
            await connection.head()
            connection.pour(sink)
            while not await connection.poured():
                await asyncio.sleep(rng.choice([0, 0.001]))
                connection.resume()
            assert bytes(came) == sent

    run(test())


def test_a_host_is_named_as_http_wants_it() -> None:
    assert origin("http://engine:8000").name == b"engine:8000"
    assert origin("http://engine:80").name == b"engine"
    assert origin("https://[::1]").name == b"[::1]"
    assert (origin("https://[::1]:8443").host, origin("https://[::1]:8443").port) == ("::1", 8443)
