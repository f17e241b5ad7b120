"""The connection to Redis or Valkey: what both the store and the leases send their commands through.

One primitive: a *round* of requests, each for one partition, sent to all servers they touch at once. A request is sent
again, to whoever serves the partition now, when a connection broke, a slot moved or a master changed; so a command may
be carried out twice, and all of ours bear that. Scripts a server does not know (it restarted, or has just been made
master) are loaded and called again. Whatever goes wrong for good is one error: `StoreUnavailable`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from kvatlas_indexer.adapters.redis_nodes import Node, Topology, topology_of
from kvatlas_indexer.adapters.redis_packing import Argument, bulk, command, head
from kvatlas_indexer.adapters.redis_scripts import Script
from kvatlas_indexer.adapters.redis_url import Layout, StoreUrl
from kvatlas_indexer.core.contracts import IndexUnavailable

ATTEMPTS = 4
PAUSE_S = 0.02
"""Before a request is sent again to a server that is busy becoming what it should be."""
PREFIX = "kva1:"
PARTITIONS = {Layout.SINGLE: 1, Layout.SENTINEL: 1, Layout.CLUSTER: 4}
VERSION_MIN = (6, 2)

_MOVED = ("MOVED", "READONLY", "CLUSTERDOWN", "MASTERDOWN")
_BUSY = ("ASK", "TRYAGAIN", "LOADING", "BUSY")
_log = logging.getLogger(__name__)


class StoreUnavailable(IndexUnavailable):
    """The shared store could not be asked, or could not do what it was asked. The message says why."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds. Every round ends within its time, sendings again included."""

    connect_s: float = 0.5
    command_s: float = 2.0
    lookup_s: float = 0.25


@dataclass(slots=True)
class Request:
    """Packed commands for one partition, and how many replies they will have."""

    partition: int
    data: list[bytes]
    replies: int = 1


@dataclass(slots=True)
class _Round:
    requests: Sequence[Request]
    answers: list[list[Any]]
    open: list[int]
    why: str = ""
    moved: bool = False
    busy: bool = False
    final: bool = False  # sending it again will not help
    unknown: set[Node] = field(default_factory=set)  # nodes that did not know a script


class RedisClient:
    """`name`: the store as messages call it. `prefix`: what all our keys begin with."""

    def __init__(self, topology: Topology, name: str, prefix: str, partitions: int, timeouts: Timeouts) -> None:
        self.name = name
        self.prefix = f"{prefix}{partitions}:"
        self.partitions = partitions
        self.timeouts = timeouts
        self.evicts = ""  # why its server may drop entries
        self._topology = topology
        self._looking = asyncio.Lock()
        self._looked = 0
        self._scripts: dict[bytes, Script] = {}

    def key(self, partition: int, suffix: str) -> bytes:
        """The name of something in a partition: `<prefix>{partition}<suffix>`."""
        return f"{self.prefix}{{{partition}}}{suffix}".encode()

    async def command(self, partition: int, *arguments: Argument) -> Any:
        """One command, its reply as redis-py's parser gives it (RESP 2). Raises `StoreUnavailable`."""
        ((reply,),) = await self.round([Request(partition, [command(*arguments)])])
        return reply

    async def pipeline(self, partition: int, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Several commands to one partition, not atomic. Raises `StoreUnavailable`."""
        if not commands:
            return []
        (replies,) = await self.round([Request(partition, [command(*c) for c in commands], len(commands))])
        return replies

    async def script(
        self, partition: int, script: Script, keys: Sequence[bytes], arguments: Sequence[Argument] = ()
    ) -> Any:
        """Run a script in a partition; all keys are in it. Raises `StoreUnavailable`."""
        ((reply,),) = await self.round([Request(partition, [self.call(script, keys, arguments)])])
        return reply

    async def run_script(self, text: str, keys: Sequence[bytes], args: Sequence[Argument]) -> Any:
        """Run a script, given as its text, in partition 0. Raises `StoreUnavailable`."""
        return await self.script(0, Script.of(text.encode()), keys, args)

    def call(self, script: Script, keys: Sequence[bytes], arguments: Sequence[Argument] = ()) -> bytes:
        """A packed call of a script."""
        self.know(script)
        return b"".join(
            [
                head(3 + len(keys) + len(arguments)),
                b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % script.sha,
                bulk(len(keys)),
                *map(bulk, keys),
                *map(bulk, arguments),
            ]
        )

    def know(self, script: Script) -> None:
        """This script may be called: it is loaded where a server turns out not to have it."""
        self._scripts[script.sha] = script

    async def round(self, requests: Sequence[Request], *, timeout_s: float | None = None) -> list[list[Any]]:
        """The replies to each request, in order. Raises `StoreUnavailable` if one of them got none, or an error."""
        limit = self.timeouts.command_s if timeout_s is None else timeout_s
        state = _Round(requests, [[] for _ in requests], list(range(len(requests))))
        try:
            async with asyncio.timeout(limit):
                for _ in range(ATTEMPTS):
                    await self._attempt(state)
                    if not state.open:
                        return state.answers
                    if state.final:
                        break
                    await self._prepare(state)
        except TimeoutError:
            raise StoreUnavailable(f"{self.name}: {state.why or f'no answer within {limit} s'}") from None
        except RedisError as error:
            raise StoreUnavailable(f"{self.name}: {error}") from error
        raise StoreUnavailable(f"{self.name}: {state.why}")

    async def _attempt(self, state: _Round) -> None:
        """Send what is open, to all servers at once; note what is to be done before the rest is sent again."""
        by_node: dict[Node, list[int]] = {}
        for index in state.open:
            by_node.setdefault(self._topology.node(state.requests[index].partition), []).append(index)
        state.open, state.moved, state.busy, state.unknown = [], False, False, set()
        if len(by_node) == 1:
            ((node, indices),) = by_node.items()
            await self._exchange(state, node, indices)
        else:
            await asyncio.gather(*(self._exchange(state, node, indices) for node, indices in by_node.items()))

    async def _exchange(self, state: _Round, node: Node, indices: list[int]) -> None:
        requests = [state.requests[index] for index in indices]
        try:
            data = [part for request in requests for part in request.data]
            replies = await node.exchange(data, sum(request.replies for request in requests))
        except RedisConnectionError as error:
            state.why, state.moved = str(error), True
            state.open += indices
            await node.drop_idle()
            return
        start = 0
        for index, request in zip(indices, requests, strict=True):
            answer = state.answers[index] = replies[start : start + request.replies]
            start += request.replies
            refused = next((reply for reply in answer if isinstance(reply, ResponseError)), None)
            if refused is not None:
                self._judge(state, node, index, refused)

    def _judge(self, state: _Round, node: Node, index: int, error: ResponseError) -> None:
        """What is to be done before this request is sent again, if anything helps."""
        code = error.status_code or ""
        state.why = f"{node.name}: {code} {error}"
        if code == "NOSCRIPT":
            state.unknown.add(node)
        elif code in _MOVED:
            state.moved = True
        elif code in _BUSY or str(error).startswith(_BUSY):
            state.busy = True
        else:
            state.final = True
        state.open.append(index)

    async def _prepare(self, state: _Round) -> None:
        for node in state.unknown:
            await node.exchange([command("SCRIPT", "LOAD", s.text) for s in self._scripts.values()], len(self._scripts))
        if state.moved:
            await self._look_again()
        if state.busy:
            await asyncio.sleep(PAUSE_S)

    async def _look_again(self) -> None:
        """Many requests fail at once; one of them looks."""
        seen = self._looked
        async with self._looking:
            if seen == self._looked:
                await self._topology.refresh()
                self._looked += 1

    async def connect(self) -> None:
        """Find the servers. Raises `StoreUnavailable`."""
        try:
            async with asyncio.timeout(self.timeouts.command_s):
                await self._look_again()
        except TimeoutError:
            raise StoreUnavailable(f"{self.name}: no answer within {self.timeouts.command_s} s") from None
        except RedisError as error:
            raise StoreUnavailable(f"{self.name}: {error}") from error

    async def info(self, partition: int, section: str) -> dict[str, str]:
        """One section of INFO of the server a partition is on. Raises `StoreUnavailable`."""
        return parse_info(await self.command(partition, "INFO", section))

    async def aclose(self) -> None:
        await self._topology.aclose()


def parse_info(reply: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in reply.decode().splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}


async def open_redis(
    url: str,
    *,
    prefix: str = PREFIX,
    partitions: int | None = None,
    timeouts: Timeouts | None = None,
    connections_max: int = 16,
    evictions_allowed: bool = False,
) -> RedisClient:
    """Connect and check that the store can hold an index: its version, and that it drops nothing of itself.

    `connections_max`: per server. `evictions_allowed`: take a server that may drop entries all the same.
    Raises `ValueError` for a URL or prefix that cannot be, `StoreUnavailable` for everything else.
    """
    where = StoreUrl.parse(url)
    if set(prefix) & set("{}*?[]\\ ") or not prefix.isascii():
        raise ValueError(f"key prefix {prefix!r}: no braces, wildcards or blanks, they mean something to Redis")
    count = PARTITIONS[where.layout] if partitions is None else partitions
    if not 1 <= count <= 256:
        raise ValueError(f"{count} partitions: there may be 1 to 256")
    limits = timeouts or Timeouts()
    tags = [b"%d" % partition for partition in range(count)]
    topology = topology_of(where, tags, connect_s=limits.connect_s, connections_max=connections_max)
    client = RedisClient(topology, str(where), prefix, count, limits)
    try:
        await client.connect()
        for partition in range(count):
            check_version(await client.info(partition, "server"), client.name)
            memory = await client.info(partition, "memory")
            client.evicts = check_policy(memory, client.name, evictions_allowed=evictions_allowed) or client.evicts
    except BaseException:
        await client.aclose()
        raise
    return client


def check_version(info: Mapping[str, str], name: str) -> None:
    """Raises `StoreUnavailable` for a server too old. Valkey tells the Redis version it is compatible with."""
    text = info.get("redis_version", "0")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if version < VERSION_MIN:
        raise StoreUnavailable(f"{name}: it is Redis {text}; Redis 6.2 or later is needed, or any Valkey")


def check_policy(info: Mapping[str, str], name: str, *, evictions_allowed: bool) -> str:
    """What is wrong with it all the same; "" is nothing.

    Raises `StoreUnavailable` where memory is limited and entries would be dropped: all of ours may expire.
    """
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction" or int(info.get("maxmemory", "0")) == 0:
        return ""
    problem = (
        f"{name}: maxmemory-policy is {policy}, which drops entries of the index without a word once memory is full, "
        "and engines would count as exact that are not. Cure: CONFIG SET maxmemory-policy noeviction (a full store "
        "then refuses writes, and says so)"
    )
    if not evictions_allowed:
        raise StoreUnavailable(problem)
    _log.warning("%s", problem)
    return problem
