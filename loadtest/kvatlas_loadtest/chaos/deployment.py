"""The deployment that is put to the test: real processes on loopback, wired as users wire them.

| who | how |
|---|---|
| 5 simulated engines | 3 are dialled, 2 connect to a service in front of the shards, each to another one |
| of them 2 | speak through a relay of ZeroMQ frames, which can lose, repeat and reorder their messages |
| 3 indexer shards | each reaches Redis through a relay of its own, which can be cut |
| 2 routers | know the shards, learn the engines from them |
| 1 Valkey | without persistence |

With the memory store there is one indexer, and no Valkey.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvatlas_loadtest.chaos.wires import FrameRelay, TcpRelay
from kvatlas_loadtest.process import Node
from kvatlas_loadtest.valkey import Valkey

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Options:
    """`redis`: shards over one Valkey, else one indexer with the memory store. `replay`: engines can be asked again.

    `lookup_deadline_ms` of the routers: what is tested is the deployment, not how crowded this machine is.
    """

    redis: bool = True
    replay: bool = True
    shards: int = 3
    routers: int = 2
    blocks: int = 320  # each engine's pool
    speed: float = 1.0
    lookup_deadline_ms: float = 200.0
    seed: int = 0


class EngineNode(Node):
    """A simulated engine. `dialled`: it binds, and indexers come to it. `relay`: its messages go through that one."""

    def __init__(self, name: str, folder: Path, options: Options, *, dialled: bool) -> None:
        super().__init__(name, folder, self._arguments, self._heard)
        self.address = ""
        self.dialled = dialled
        self.relay: FrameRelay | None = None
        self.service = ""  # where it connects to, if it is not dialled
        self._options = options
        self._events = self._replay = "tcp://127.0.0.1:0"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def flag(self) -> str:
        """How an indexer is told of it."""
        parts = [self.address]
        if self.dialled:
            parts.append(f"events={self.relay.outlet if self.relay else self._events}")
        if self._options.replay:
            parts.append(f"replay={self._replay}")
        return ",".join(parts)

    def _arguments(self) -> Sequence[str]:
        options = self._options
        port = self.address.rpartition(":")[2] or "0"
        events = (
            self._events.replace(HOST, "*") if self.lives > 1 else self._events
        )  # a host is connected to, not bound
        if not self.dialled:
            events = self.relay.inlet if self.relay else self.service
        command = ["kvatlas_loadtest", "engine", "--debug", "--port", port, "--kv-events-endpoint", events]
        command += ["--kv-events-replay-endpoint", self._replay if options.replay else ""]
        command += ["--num-gpu-blocks-override", str(options.blocks), "--speed", str(options.speed)]
        return command

    def _heard(self, line: dict[str, Any]) -> bool:
        if "address" not in line:
            return False
        self.address = line["address"]
        self._replay = line["replay_endpoint"] or self._replay
        if self.dialled:
            self._events = f"tcp://{HOST}:{line['events_endpoint'].rpartition(':')[2]}"
        return True


class ShardNode(Node):
    """An indexer."""

    def __init__(self, name: str, folder: Path, options: Options, engines: Callable[[], Iterable[str]]) -> None:
        super().__init__(name, folder, self._arguments, self._heard)
        self.grpc, self.rest, self.zmq = f"{HOST}:0", f"{HOST}:0", f"tcp://{HOST}:0"
        self.redis: TcpRelay | None = None
        self._options = options
        self._engines = engines

    @property
    def url(self) -> str:
        return f"http://{self.rest}"

    def _arguments(self) -> Sequence[str]:
        command = ["kvatlas_cli", "indexer", "--grpc-listen", self.grpc, "--rest-listen", self.rest]
        command += ["--zmq-listen", self.zmq]
        for engine in self._engines():
            command += ["--engine", engine]
        if self._options.redis:
            assert self.redis is not None
            command += ["--store", f"redis://{self.redis.address}/0", "--shard", self.name]
        return command

    def _heard(self, line: dict[str, Any]) -> bool:
        if line.get("event") != "indexer ready":
            return False
        self.grpc, self.rest, self.zmq = line["grpc"], line["rest"], line["zmq"][0]
        return True


class RouterNode(Node):
    def __init__(self, name: str, folder: Path, options: Options, shards: Callable[[], Iterable[str]]) -> None:
        super().__init__(name, folder, self._arguments, self._heard)
        self.port = self.admin_port = 0
        self._options = options
        self._shards = shards
        self._state = folder / f"{name}-state"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def _arguments(self) -> Sequence[str]:
        command = ["kvatlas_cli", "router", "--host", HOST, "--port", str(self.port)]
        command += ["--admin-port", str(self.admin_port), "--state-dir", str(self._state)]
        command += ["--lookup-deadline-ms", str(self._options.lookup_deadline_ms)]
        for shard in self._shards():
            command += ["--indexer", shard]
        return command

    def _heard(self, line: dict[str, Any]) -> bool:
        if line.get("event") != "router listens":
            return False
        self.port, self.admin_port = line["port"], line["admin_port"]
        return True


@dataclass(slots=True)
class Deployment:
    """All of it, running inside `deployed`."""

    options: Options
    folder: Path
    engines: list[EngineNode] = field(default_factory=list)
    shards: list[ShardNode] = field(default_factory=list)
    routers: list[RouterNode] = field(default_factory=list)
    valkey: Valkey | None = None

    @property
    def nodes(self) -> list[Node]:
        return [*self.engines, *self.shards, *self.routers]

    def unsound(self) -> list[str]:
        """Signs of our bugs in any log."""
        return [sign for node in self.nodes for sign in node.unsound()]


@contextlib.asynccontextmanager
async def deployed(options: Options, folder: Path, say: Callable[[str], None]) -> AsyncIterator[Deployment]:
    """Starts everything, and ends all of it however it is left. Raises `ProcessFailed`."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    deployment = Deployment(options, folder)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(_kill_all, deployment)
        if options.redis:
            say("starting Valkey")
            deployment.valkey = await asyncio.to_thread(Valkey(folder / "valkey").start)
        say("starting engines")
        await _start_engines(deployment, stack)
        say("starting shards")
        await _start_shards(deployment, stack)
        say("starting routers")
        grpc = [shard.grpc for shard in deployment.shards]
        deployment.routers += [RouterNode(f"router-{n}", folder, options, lambda: grpc) for n in range(options.routers)]
        await _start(deployment.routers)
        yield deployment


async def _start_engines(deployment: Deployment, stack: contextlib.AsyncExitStack) -> None:
    options, folder = deployment.options, deployment.folder
    plain = [EngineNode(f"dialled-{n}", folder, options, dialled=True) for n in range(2)]
    relayed = EngineNode("dialled-relayed", folder, options, dialled=True)
    listened = EngineNode("listened", folder, options, dialled=False)
    listened_relayed = EngineNode("listened-relayed", folder, options, dialled=False)
    deployment.engines += [*plain, relayed, listened, listened_relayed]
    services = []
    for n in range(2):
        service = TcpRelay(lambda n=n: _service_targets(deployment.shards, n))  # type: ignore[misc]
        await service.start()
        stack.push_async_callback(service.close)
        services.append(f"tcp://{service.address}")
    listened.service = services[0]
    listened_relayed.relay = await _relay(stack, source=None, sink=services[1], seed=options.seed)
    await _start(deployment.engines)
    relayed.relay = await _relay(stack, source=relayed._events, sink=None, seed=options.seed + 1)


async def _start_shards(deployment: Deployment, stack: contextlib.AsyncExitStack) -> None:
    options, folder, valkey = deployment.options, deployment.folder, deployment.valkey
    flags = [engine.flag for engine in deployment.engines]
    for n in range(options.shards if options.redis else 1):
        shard = ShardNode(f"shard-{n}", folder, options, lambda: flags)
        if valkey is not None:
            shard.redis = TcpRelay(lambda: [valkey.address])
            await shard.redis.start()
            stack.push_async_callback(shard.redis.close)
        deployment.shards.append(shard)
    await _start(deployment.shards)


async def _relay(stack: contextlib.AsyncExitStack, *, source: str | None, sink: str | None, seed: int) -> FrameRelay:
    relay = FrameRelay(source=source, sink=sink, seed=seed)
    await relay.start()
    stack.push_async_callback(relay.close)
    return relay


async def _start(nodes: Sequence[Node]) -> None:
    await asyncio.gather(*(node.start() for node in nodes))


def _service_targets(shards: Sequence[ShardNode], first: int) -> list[str]:
    """Where a service sends new connections: the shards that run, from another one on for each engine."""
    turned = [shards[(first + n) % len(shards)] for n in range(len(shards))]
    return [shard.zmq.removeprefix("tcp://") for shard in turned if shard.running and not shard.zmq.endswith(":0")]


def _kill_all(deployment: Deployment) -> None:
    for node in deployment.nodes:
        node.kill()
    if deployment.valkey is not None:
        deployment.valkey.stop()
