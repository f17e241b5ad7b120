"""Takes KV event messages off the network and hands them on as they came; what they mean is the core's business.

Two ways in, both at once. *Listen*: the indexer binds and engines connect; one port per data-parallel rank, because
vLLM adds the rank to the port in both directions. *Dial*: engines bind, and each engine (each rank) has a socket of its
own, so that the origin of a message is certain whatever its topic claims.

libzmq's file descriptor is edge-triggered: it tells that something changed, once. So a socket that became readable is
read until it has nothing left, if need be over several turns of the loop. A turn takes a bounded time, and within it
the sockets that have something take it in rounds, so that neither a busy engine starves the others nor all of them
starve gRPC. A bound SUB socket learns of a new engine, and subscribes to it, only when it is read: the descriptor
announces that too.

Who dials is told of its connections too: what an engine publishes while there is none is lost, and no message shows it
before the next one comes.

When a receive queue is full (`queue_messages_max` per engine), TCP pushes back and messages wait at the *engine*, whose
own queue holds 100,000 (vLLM's default); what it drops beyond shows here only as a gap in the sequence, which the core
counts. The queue is short: what waits here for long takes memory never used before, and is in no processor's cache by
the time it is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Generic, TypeVar

import zmq

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.addresses import unavailable
from kvatlas_indexer.adapters.zmq_connection import Connection
from kvatlas_indexer.adapters.zmq_sockets import MESSAGE_BYTES_MAX, Context, Socket, new_socket

log = logging.getLogger(__name__)

FAILURE_LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a message came in.

    `endpoint`: the one listened on (`tcp://*:5557`, its rank added) or dialled. `peer`: IP address of a listened
    message's sender, as TCP knows it. `dialled`: the engine that was dialled. `port_rank`: the data-parallel rank this
    port stands for.
    """

    endpoint: str
    peer: str | None
    dialled: EngineId | None
    port_rank: int


T = TypeVar("T")
OnConnection = Callable[[EngineId, bool], None]


@dataclass(frozen=True, slots=True)
class ZmqSourceOptions:
    """`turn_s`: how long one turn may keep the event loop; `round_messages_max`: messages of one socket per round,
    and `round_bytes_max` their bytes, beyond which it takes no more.

    `topic_prefix`: only messages whose topic starts with it are taken at all. The reconnect times are those of ZeroMQ:
    the first interval, doubled after each failure up to the second.
    """

    topic_prefix: str = ""
    queue_messages_max: int = 64
    message_bytes_max: int = MESSAGE_BYTES_MAX
    turn_s: float = 0.001
    round_messages_max: int = 16
    round_bytes_max: int = 1 << 20
    reconnect_s: float = 0.1
    reconnect_max_s: float = 1.0


@dataclass(slots=True)
class Received:
    """Counts since the start. `failures`: messages whose handler raised (a bug of ours; the message is lost)."""

    messages: int = 0
    bytes: int = 0
    failures: int = 0


@dataclass(slots=True, eq=False)
class _Inlet:
    """One socket, and where its messages come from. `origin` is that of the last message: most come in runs."""

    socket: Socket
    descriptor: int
    origin: Origin
    connection: Connection | None = None  # of a dialled engine
    waiting: bool = False  # stands in the queue of those with something to read


class ZmqSource(Generic[T]):
    """Every KV event stream of an indexer. Used from one event loop; `on_message(origin, read(frames))` is
    called in it.

    `frames` is what was received: `[topic, sequence, payload]` from a vLLM engine, any number of any bytes from others.
    A round's messages are all read before the first is handed on. `on_turn()` follows the messages of a turn: what need
    not be done after each of them is done once after all. `on_connection(engine, up)` is called for a dialled engine:
    not up when it is dialled, and at every change.
    """

    def __init__(
        self,
        context: Context,
        read: Callable[[list[bytes]], T],
        on_message: Callable[[Origin, T], None],
        options: ZmqSourceOptions = ZmqSourceOptions(),
        *,
        on_connection: OnConnection = lambda engine, up: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.received = Received()
        self._context = context
        self._read = read
        self._on_message = on_message
        self._on_connection = on_connection
        self._on_turn = on_turn
        self._options = options
        self._listening: list[_Inlet] = []
        self._dialled: dict[EngineId, _Inlet] = {}
        self._readable: deque[_Inlet] = deque()
        self._turn: asyncio.Handle | None = None
        self._failure_logged_at = float("-inf")

    def listen(self, endpoints: tuple[str, ...], ranks: int = 1) -> tuple[str, ...]:
        """Bind each endpoint, and the next `ranks - 1` ports after it. Answers the endpoints bound, rank by rank.

        A port of 0 or `*` takes a free port for every rank. Raises `AddressUnavailable`, with nothing left bound.
        """
        bound: list[_Inlet] = []
        try:
            for endpoint in endpoints:
                for rank in range(ranks):
                    bound.append(self._bind(with_rank(endpoint, rank), rank))
        except Exception:
            for inlet in bound:
                self._close(inlet)
            raise
        self._listening += bound
        return tuple(inlet.origin.endpoint for inlet in bound)

    def set_dialled(self, engines: Mapping[EngineId, str]) -> dict[EngineId, str]:
        """From now on receive from exactly these engines, each at its own endpoint (rank N's port included).

        Those already dialled at the same endpoint are left alone. An engine that is not up, or whose name does not
        resolve yet, is tried again and again. Answers those whose endpoint can never be dialled, and why.
        """
        for engine in [e for e, inlet in self._dialled.items() if engines.get(e) != inlet.origin.endpoint]:
            self._close(self._dialled.pop(engine))
        refused: dict[EngineId, str] = {}
        for engine, endpoint in engines.items():
            if engine not in self._dialled:
                self._on_connection(engine, False)
                try:
                    self._dialled[engine] = self._connect(engine, endpoint)
                except zmq.ZMQError as error:
                    refused[engine] = f"{endpoint!r} cannot be dialled: {error}"
        return refused

    def close(self) -> None:
        """Stop receiving. Messages not handed on yet are dropped: after a restart they are replayed."""
        for inlet in (*self._listening, *self._dialled.values()):
            self._close(inlet)
        self._listening.clear()
        self._dialled.clear()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def _socket(self) -> Socket:
        socket = new_socket(self._context, zmq.SUB, message_bytes_max=self._options.message_bytes_max)
        socket.set(zmq.RCVHWM, self._options.queue_messages_max)
        socket.set(zmq.RECONNECT_IVL, round(self._options.reconnect_s * 1000))
        socket.set(zmq.RECONNECT_IVL_MAX, round(self._options.reconnect_max_s * 1000))
        socket.subscribe(self._options.topic_prefix.encode())
        return socket

    def _bind(self, endpoint: str, rank: int) -> _Inlet:
        socket = self._socket()
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise unavailable("KV events", endpoint, error.errno or 0, "--zmq-listen") from error
        if endpoint.endswith((":0", ":*")):
            port = socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
            endpoint = endpoint[:-1] + port
        return self._open(socket, Origin(endpoint, None, None, rank))

    def _connect(self, engine: EngineId, endpoint: str) -> _Inlet:
        socket = self._socket()
        connection = Connection(socket, partial(self._on_connection, engine))
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            connection.close()
            socket.close()
            raise
        return self._open(socket, Origin(endpoint, None, engine, engine.rank), connection)

    def _open(self, socket: Socket, origin: Origin, connection: Connection | None = None) -> _Inlet:
        inlet = _Inlet(socket, int(socket.get(zmq.FD)), origin, connection)
        asyncio.get_running_loop().add_reader(inlet.descriptor, self._became_readable, inlet)
        self._became_readable(inlet)  # bind and connect may have consumed the edge
        return inlet

    def _close(self, inlet: _Inlet) -> None:
        asyncio.get_running_loop().remove_reader(inlet.descriptor)
        if inlet.connection is not None:
            inlet.connection.close()
        inlet.socket.close()
        if inlet.waiting:
            self._readable.remove(inlet)

    def _became_readable(self, inlet: _Inlet) -> None:
        if not inlet.waiting:
            inlet.waiting = True
            self._readable.append(inlet)
            self._schedule_turn()

    def _schedule_turn(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Read what is there, round by round, until nothing is or the time is up; then let the loop do other things."""
        self._turn = None
        ends_at = perf_counter() + self._options.turn_s
        while self._readable:
            inlet = self._readable.popleft()
            inlet.waiting = False
            more = self._take_round(inlet)
            if more and not inlet.socket.closed and not inlet.waiting:
                inlet.waiting = True
                self._readable.append(inlet)
            if perf_counter() >= ends_at:
                break
        if self._readable:
            self._schedule_turn()
        self._on_turn()

    def _take_round(self, inlet: _Inlet) -> bool:
        """Hand on some messages of one socket. False: it has none left, and its descriptor will tell of the next."""
        came, more = self._receive(inlet)
        self.received.messages += len(came)
        read: list[tuple[Origin, T]] = []
        for origin, frames in came:
            try:
                read.append((origin, self._read(frames)))
            except Exception:
                self._lose(origin)
        for origin, message in read:
            if inlet.socket.closed:  # by what a message led to
                return False
            try:
                self._on_message(origin, message)
            except Exception:
                self._lose(origin)
        return more

    def _receive(self, inlet: _Inlet) -> tuple[list[tuple[Origin, list[bytes]]], bool]:
        """Also whether there may be more."""
        receive = inlet.socket.recv
        came: list[tuple[Origin, list[bytes]]] = []
        ends_at = self.received.bytes + self._options.round_bytes_max
        while len(came) < self._options.round_messages_max and self.received.bytes < ends_at:
            try:
                frame = first = receive(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return came, False
            frames = [first.bytes]
            while frame.more:
                frame = receive(zmq.DONTWAIT, copy=False)
                frames.append(frame.bytes)
            if inlet.origin.dialled is None:
                peer = _peer(first)
                if peer != inlet.origin.peer:
                    inlet.origin = Origin(inlet.origin.endpoint, peer, None, inlet.origin.port_rank)
            self.received.bytes += sum(map(len, frames))
            came.append((inlet.origin, frames))
        return came, True

    def _lose(self, origin: Origin) -> None:
        """A bug behind a callback must not deafen the indexer to every other engine: it costs one message."""
        self.received.failures += 1
        now = perf_counter()
        if now - self._failure_logged_at >= FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            log.exception("a KV event message from %s was lost to an error of ours", origin)


def with_rank(endpoint: str, rank: int) -> str:
    """The endpoint of one data-parallel rank: its port is higher by the rank (vLLM 0.32 `offset_endpoint_port`).

    Raises `ValueError` when the endpoint has no port.
    """
    if rank == 0:
        return endpoint
    base, colon, port = endpoint.rpartition(":")
    if colon and port in ("0", "*"):
        return endpoint
    if not (colon and port.isdecimal()):
        raise ValueError(f"endpoint {endpoint!r} ends in no port to add rank {rank} to")
    return f"{base}:{int(port) + rank}"


def _peer(frame: zmq.Frame) -> str | None:
    try:
        address = str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # in-process and Unix sockets have none
        return None
    return address.removeprefix("::ffff:")
