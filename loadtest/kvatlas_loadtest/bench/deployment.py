"""The processes a measurement needs: engines that cost nothing, indexers on any store, routers, a Valkey of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from kvatlas_loadtest.process import Node
from kvatlas_loadtest.valkey import Valkey
from kvatlas_router.adapters.index_client import LookupFailed, Shard

READY_S = 60.0
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Stubs:
    """Stub engines. `events`: where each publishes; empty without."""

    pid: int
    addresses: tuple[str, ...]
    events: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """An indexer (`grpc`, `rest`) or a router (`url`, `admin`)."""

    pid: int
    said: dict[str, Any]

    @property
    def grpc(self) -> str:
        return str(self.said["grpc"])

    @property
    def rest(self) -> str:
        return f"http://{self.said['rest']}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.said['port']}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.said['admin_port']}"


@contextlib.asynccontextmanager
async def stub_engines(folder: Path, count: int, *, events: bool = False) -> AsyncIterator[Stubs]:
    command = ["kvatlas_loadtest.bench.stub_engines", "--count", str(count), *(["--events"] if events else [])]
    async with process("engines", folder, command, lambda line: "addresses" in line) as (pid, said):
        yield Stubs(pid, tuple(said["addresses"]), tuple(said["events"]))


@contextlib.asynccontextmanager
async def indexer(folder: Path, *options: str, name: str = "indexer") -> AsyncIterator[Service]:
    ports = ("--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0", "--zmq-listen", "")
    command = ["kvatlas_indexer", *ports, *options]
    async with process(name, folder, command, lambda line: line.get("event") == "indexer ready") as (pid, said):
        yield Service(pid, said)


@contextlib.asynccontextmanager
async def router(folder: Path, *options: str, name: str = "router") -> AsyncIterator[Service]:
    ports = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0")
    command = ["kvatlas_router", *ports, *options]
    async with process(name, folder, command, lambda line: line.get("event") == "router listens") as (pid, said):
        yield Service(pid, said)


@contextlib.asynccontextmanager
async def valkey(folder: Path) -> AsyncIterator[Valkey]:
    server = await asyncio.to_thread(Valkey(folder / "valkey").start)
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def client(service: Service) -> AsyncIterator[Shard]:
    """As a router asks an indexer."""
    shard = Shard(service.grpc, "bench", lambda: None, lambda: None)
    try:
        yield shard
    finally:
        await shard.close()


@contextlib.asynccontextmanager
async def process(
    name: str, folder: Path, command: Sequence[str], ready: Callable[[Any], bool]
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    said: dict[str, Any] = {}

    def heard(line: Any) -> bool:
        if ready(line):
            said.update(line)
        return bool(said)

    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    node = Node(name, folder, lambda: command, heard)
    try:
        await node.start()
        yield node.pid, said
    finally:
        node.kill()


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, *, within_s: float = READY_S, every_s: float = POLL_S
) -> None:
    """Raises `TimeoutError` that says what did not happen."""
    try:
        async with asyncio.timeout(within_s):
            while not await condition():
                await asyncio.sleep(every_s)
    except TimeoutError:
        raise TimeoutError(f"{what}: not within {within_s:g} s") from None


async def found(shard: Shard, request: Any, engine: str, blocks: int) -> bool:
    """Whether a lookup finds so many blocks on an engine."""
    try:
        answer = await shard.match(request, 5.0)
    except LookupFailed:
        return False
    return any(str(match.engine) == engine and match.blocks == blocks for match in answer.matches)


async def page(url: str) -> Any:
    """A JSON answer."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        response.raise_for_status()
        return await response.json()


async def answers(url: str) -> bool:
    """Whether it says 200."""
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False
