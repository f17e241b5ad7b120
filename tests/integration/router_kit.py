"""What tests of the router's sockets share: an engine that does exactly what a test says, byte by byte, and a running
router with the ports it took."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from kvatlas_common.fleet import Fleet, Health
from kvatlas_common.settings import load
from kvatlas_common.tracing import Tracing
from kvatlas_router.app import Router
from kvatlas_router.settings import RouterSettings
from tests.integration.processes import DEADLINE_S, until

NO_INDEXER = ("--indexer", "127.0.0.1:9")  # the discard port, which nobody serves here
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@dataclass(frozen=True)
class Seen:
    """A request as it arrived at an engine. `headers`: names in lower case, in order."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k == name), None)


Script = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "".join(f"{h}\r\n" for h in headers or ("Content-Type: application/json",))
    return f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def replying(reply: bytes) -> Script:
    async def script(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        await writer.drain()

    return script


async def hang_up(_: Seen, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@dataclass
class ScriptedEngine:
    """Speaks HTTP/1.1 over plain streams. Probes are answered; everything else is `script`'s to answer.

    `gone` is set when a client closes its connection while the script runs.
    """

    script: Script = field(default_factory=lambda: replying(answer(b'{"ok": true}')))
    models: tuple[str, ...] = ("tiny",)
    figures: bytes = b""  # the page of its metrics
    seen: list[Seen] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        await self.die()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Every connection breaks, and nobody listens any more."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (seen := await _read(reader)) is not None:
                await self._answer(seen, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = seen.target.partition("?")[0]
        if path in ("/health", "/v1/models") or path.startswith("/metrics"):
            cards = [{"id": m, "object": "model", "root": None, "parent": None} for m in self.models]
            page = json.dumps({"object": "list", "data": cards}).encode() if path == "/v1/models" else b""
            page = self.figures if path.startswith("/metrics") else page
            writer.write(answer(page))
            await writer.drain()
            return
        self.seen.append(seen)
        self.arrived.set()
        running = asyncio.ensure_future(self.script(seen, writer))
        closed = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({running, closed}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            self.gone.set()
            running.cancel()
        closed.cancel()
        await asyncio.gather(running, closed, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(k.lower(), v.strip()) for k, _, v in (line.partition(":") for line in lines)]
    length = int(dict(headers).get("content-length", "0"))
    return Seen(method, target, headers, await reader.readexactly(length) if length else b"")


@dataclass
class Running:
    """A started router and a client for it."""

    router: Router
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.public_port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.router.admin_port}"

    async def post(
        self, path: str = "/v1/chat/completions", body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        data = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
        async with self.http.post(URL(self.url + path, encoded=True), data=data, headers=headers) as reply:
            return reply.status, reply.headers, await reply.read()

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.http.get(self.url + path) as reply:
            return reply.status, await reply.read()

    def figure(self, name: str, **labels: str) -> float:
        return self.router.metrics.registry.get_sample_value(f"kvatlas_router_{name}", labels) or 0.0

    async def until(self, holds: Callable[[Fleet], bool]) -> Fleet:
        """Waits until the router's picture of the fleet is as wanted."""
        changed = asyncio.Event()

        def listener(_: Fleet) -> None:
            changed.set()

        self.router.fleet.on_change.append(listener)
        async with asyncio.timeout(DEADLINE_S):
            while not holds(self.router.fleet.fleet):
                await changed.wait()
                changed.clear()
        self.router.fleet.on_change.remove(listener)
        return self.router.fleet.fleet


@asynccontextmanager
async def running(
    *argv: str, ready: int = 0, environ: Mapping[str, str] | None = None, tracing: Tracing | None = None
) -> AsyncIterator[Running]:
    """A router on free ports; entered when `ready` engines are."""
    ports = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0")
    settings = load(RouterSettings, (*ports, *argv), environ or {}, prog="kvatlas router")
    router = Router(settings, {}, tracing)
    await router.start()
    try:
        session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=30))
        async with session as http:
            run = Running(router, http)
            await run.until(lambda f: sum(v.health is Health.READY for v in f.engines.values()) >= ready)
            yield run
    finally:
        await router.stop()


@asynccontextmanager
async def routed(
    *served: ScriptedEngine,
    flags: tuple[str, ...] = NO_INDEXER,
    environ: Mapping[str, str] | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[Running]:
    """A router before engines that are listed, started here, and ready."""
    async with AsyncExitStack() as stack:
        for engine in served:
            await stack.enter_async_context(engine)
        listed = [flag for e in served for flag in ("--engine", e.address)]
        yield await stack.enter_async_context(
            running(*listed, *flags, ready=len(served), environ=environ, tracing=tracing)
        )


async def eventually(holds: Callable[[], bool], what: str) -> None:
    """For conditions that nothing announces."""
    await until(holds, what)


def sse(text: bytes) -> list[Any]:
    """The data of each event of a stream, `[DONE]` as it is."""
    data = [e.partition(b"data: ")[2] for e in text.split(b"\n\n") if b"data: " in e]
    return [d if d == b"[DONE]" else json.loads(d) for d in data]
