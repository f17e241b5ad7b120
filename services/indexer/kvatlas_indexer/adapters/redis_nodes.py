"""Connections to the servers of the shared store, and which server a partition is on.

A `Node` is one server: a bounded number of redis-py connections, each carrying one exchange at a time. A `Topology`
says which node a partition is on just now; whatever hints that this is no longer so (a broken connection, MOVED,
READONLY) has it look again.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvatlas_indexer.adapters.redis_url import Address, Layout, StoreUrl, show

REFUSED_S = 0.1
"""After a server could not be reached, who asks within this time is refused at once: nobody waits in line for it."""
CLUSTER_SLOTS = 16384

MakeConnection: TypeAlias = Callable[[], AbstractConnection]
MakeNode: TypeAlias = Callable[[Address], "Node"]


class Node:
    """One server, by what it is called in messages."""

    def __init__(self, name: str, make: MakeConnection, connections_max: int) -> None:
        self.name = name
        self._make = make
        self._free = asyncio.Semaphore(connections_max)
        self._idle: list[AbstractConnection] = []
        self._refused_until = 0.0
        self._why = ""

    async def exchange(self, data: Sequence[bytes], replies: int) -> list[Any]:
        """Send packed commands, read so many replies; a server's error is a reply (a `ResponseError`).

        Raises redis-py's `ConnectionError`. A cancelled exchange costs its connection: its replies are still to come.
        """
        async with self._free:
            connection = self._idle.pop() if self._idle else self._make()
            complete = False
            try:
                if not connection.is_connected:
                    await self._connect(connection)
                await connection.send_packed_command(data, check_health=False)
                answers = [await _reply(connection) for _ in range(replies)]
                complete = True
                return answers
            finally:
                if complete:
                    self._idle.append(connection)
                else:
                    await connection.disconnect(nowait=True)

    async def _connect(self, connection: AbstractConnection) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._refused_until:
            raise RedisConnectionError(self._why)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._refused_until, self._why = now + REFUSED_S, f"{self.name}: {error}"
            await self.drop_idle()
            raise RedisConnectionError(self._why) from error

    async def drop_idle(self) -> None:
        """Connections that may be broken, or lead to a server that is no longer the right one."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        """When no exchange is under way any more."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect()


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


class Topology(Protocol):
    def node(self, partition: int) -> Node:
        """Raises `RedisConnectionError` where none is known."""
        ...

    async def refresh(self) -> None:
        """Look again. Raises redis-py's errors."""
        ...

    async def aclose(self) -> None: ...


class SingleTopology:
    def __init__(self, node: Node) -> None:
        self._node = node

    def node(self, partition: int) -> Node:
        return self._node

    async def refresh(self) -> None:
        await self._node.drop_idle()

    async def aclose(self) -> None:
        await self._node.aclose()


class SentinelTopology:
    """The master the sentinels name."""

    def __init__(self, sentinel: Sentinel, service: str, make_node: MakeNode) -> None:
        self._sentinel = sentinel
        self._service = service
        self._make_node = make_node
        self._address: Address | None = None
        self._node: Node | None = None

    def node(self, partition: int) -> Node:
        if self._node is None:
            raise RedisConnectionError(f"no sentinel has named a master for {self._service!r} yet")
        return self._node

    async def refresh(self) -> None:
        host, port = await self._sentinel.discover_master(self._service)
        if self._node is not None:
            await self._node.drop_idle()
        if (host, int(port)) != self._address:
            self._address = host, int(port)
            self._node = self._make_node(self._address)

    async def aclose(self) -> None:
        if self._node is not None:
            await self._node.aclose()
        for client in self._sentinel.sentinels:
            await client.aclose()


class ClusterTopology:
    """The masters of a cluster. Only the slots of our few partitions matter."""

    def __init__(self, seeds: Sequence[Address], tags: Sequence[bytes], make_node: MakeNode, ask_s: float) -> None:
        self._seeds = tuple(seeds)
        self._ask_s = ask_s
        self._slots = [binascii.crc_hqx(tag, 0) % CLUSTER_SLOTS for tag in tags]
        self._make_node = make_node
        self._nodes: dict[Address, Node] = {}
        self._of: list[Node] = []

    def node(self, partition: int) -> Node:
        if not self._of:
            raise RedisConnectionError("no node of the cluster has said yet who serves what")
        return self._of[partition]

    async def refresh(self) -> None:
        why: Exception = RedisConnectionError("no node of the cluster is known")
        for address in dict.fromkeys([*self._nodes, *self._seeds]):
            asked = self._nodes.get(address) or self._make_node(address)
            try:
                async with asyncio.timeout(self._ask_s):
                    (ranges,) = await asked.exchange([b"*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n"], 1)
                if isinstance(ranges, ResponseError):
                    raise RedisConnectionError(f"{asked.name}: {ranges}")
                await self._take(ranges, address)
                return
            except RedisConnectionError as error:
                why = error
            except TimeoutError:
                why = RedisConnectionError(f"{asked.name}: no answer within {self._ask_s} s")
            finally:
                if asked is not self._nodes.get(address):
                    await asked.aclose()
        raise why

    async def _take(self, ranges: list[list[Any]], asked: Address) -> None:
        """`ranges`: [first slot, last slot, master, replicas...]; a node without a host is the one that was asked."""
        masters: dict[int, Address] = {}
        for first, last, (host, port, *_), *_ in ranges:
            address = (host or b"").decode().strip("?") or asked[0], int(port)
            masters |= {slot: address for slot in self._slots if first <= slot <= last}
        if missing := [slot for slot in self._slots if slot not in masters]:
            raise RedisConnectionError(f"nobody in the cluster serves slot {missing[0]}")
        gone = self._nodes.keys() - set(masters.values())
        for address in gone:
            await self._nodes.pop(address).drop_idle()
        for address in masters.values():
            if address not in self._nodes:
                self._nodes[address] = self._make_node(address)
        self._of = [self._nodes[masters[slot]] for slot in self._slots]

    async def aclose(self) -> None:
        for node in self._nodes.values():
            await node.aclose()


def topology_of(url: StoreUrl, tags: Sequence[bytes], *, connect_s: float, connections_max: int) -> Topology:
    """`tags`: the hash tag of every partition."""
    arguments: dict[str, Any] = {
        "db": url.db,
        "username": url.username,
        "password": url.password,
        "socket_connect_timeout": connect_s,
        **url.tls_arguments(),
    }
    kind = SSLConnection if url.tls else Connection

    def node(address: Address) -> Node:
        host, port = address
        return Node(
            show(address), lambda: kind(host=host, port=port, socket_keepalive=True, **arguments), connections_max
        )

    if url.layout is Layout.CLUSTER:
        return ClusterTopology(url.addresses, tags, node, connect_s)
    if url.layout is Layout.SENTINEL:
        asking = {
            "username": url.options.get("sentinel_user"),
            "password": url.options.get("sentinel_password"),
            "socket_connect_timeout": connect_s,
            "socket_timeout": connect_s,
            "retry": Retry(NoBackoff(), 0),
            "ssl": url.tls,
            **url.tls_arguments(),
        }
        sentinels = Sentinel(list(url.addresses), sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        return SentinelTopology(sentinels, url.service, node)
    if url.path:
        make = lambda: UnixDomainSocketConnection(path=url.path, **arguments)  # noqa: E731
        return SingleTopology(Node(url.path, make, connections_max))
    return SingleTopology(node(url.addresses[0]))
