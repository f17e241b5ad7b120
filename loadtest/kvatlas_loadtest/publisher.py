"""Publishes one rank's KV events as vLLM does, and misbehaves on request.

After `ZmqEventPublisher` in `vllm/distributed/kv_events.py` (0.10.0 to 0.32): PUB binds a wildcard endpoint and
connects to any other, rank N uses port + N, messages are `[topic, seq u64 BE, payload]` with seq from 0 per life, what
exceeds the high-water mark is dropped by ZeroMQ. A ROUTER answers `[b"", start seq]` with every batch still buffered
from there on, then an end marker. Its own high-water mark is ZeroMQ's default, as it is vLLM's: a client that does not
read loses the rest of a long replay.

Not as in vLLM: no thread. Sends never block (PUB drops), so they are made from the event loop; a replay is served at
once instead of within 0.1 s. And PUB is an XPUB, which differs only in that it tells of subscriptions: what is
published before one has arrived is lost, and nobody else can know when that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

BUFFERED_BATCHES = 10_000
HIGH_WATER_MARK = 100_000
ROWS_TRIED = 20
END_MARKER = b"\xff" * 8


class ReplayFault(StrEnum):
    """How replays are answered: as they should be; not at all; without the end marker; or with only the first half."""

    NONE = "none"
    SILENT = "silent"
    ENDLESS = "endless"
    TRUNCATED = "truncated"


@dataclass(slots=True)
class Faults:
    """What goes wrong with the next messages. Each is buffered for replay all the same, as lost ones are in vLLM."""

    drop: int = 0  # so many messages are not sent
    duplicate: int = 0  # so many are sent twice
    swap: int = 0  # so many are held back until the one after them has been sent
    replay: ReplayFault = ReplayFault.NONE


def rank_endpoint(endpoint: str, rank: int) -> str:
    """The endpoint of rank N: its port is N higher. Port 0 stays 0."""
    if rank == 0 or not endpoint.startswith("tcp://"):
        return endpoint if rank == 0 else f"{endpoint}_dp{rank}"
    base, _, port = endpoint.rpartition(":")
    return f"{base}:{int(port) + rank}" if int(port) else endpoint


def binds(endpoint: str) -> bool:
    """vLLM's rule: PUB binds wildcards (and local transports), and connects to a host; port 0 can only be bound."""
    return (
        "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://")) or endpoint.endswith(":0")
    )


async def open_ranks(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    replay_endpoint: str | None,
    *,
    bind: bool,
    topic: str,
    first_seq: int,
    ranks: int,
) -> list[EventPublisher]:
    """One publisher per rank, ports in a row as vLLM has them. With port 0, rows are tried until one is free.

    Raises `zmq.ZMQError` when an address cannot be bound.
    """
    any_port = endpoint.endswith(":0") or (replay_endpoint or "").endswith(":0")
    attempts = ROWS_TRIED if any_port and ranks > 1 else 1
    while True:
        attempts -= 1
        opened: list[EventPublisher] = []
        events, replay = endpoint, replay_endpoint
        try:
            for rank in range(ranks):
                own_replay = rank_endpoint(replay, rank) if replay else None
                publisher = EventPublisher(context, rank_endpoint(events, rank), bind, own_replay, topic, first_seq)
                publisher.open()
                opened.append(publisher)
                events, replay = opened[0].endpoint, opened[0].replay_endpoint  # port 0 is a real one now
        except zmq.ZMQError:
            for publisher in opened:
                await publisher.close()
            if not attempts:
                raise
        else:
            return opened


@dataclass(slots=True)
class EventPublisher:
    """One life of one publisher: `open`, `start` answering replays, `publish` any number of times, `close`.

    `endpoint` and `replay_endpoint` are this rank's own; after `open` they are those really used.
    """

    context: zmq.Context[zmq.Socket[bytes]]
    endpoint: str
    bind: bool
    replay_endpoint: str | None = None
    topic: str = ""
    next_seq: int = 0
    faults: Faults = field(default_factory=Faults)
    _pub: zmq.Socket[bytes] | None = field(default=None, init=False)
    _router: zmq.asyncio.Socket | None = field(default=None, init=False)
    _serving: asyncio.Task[None] | None = field(default=None, init=False)
    _buffer: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=BUFFERED_BATCHES), init=False)
    _held_back: list[tuple[int, bytes]] = field(default_factory=list, init=False)  # at most one, between two publishes
    _subscriptions: int = field(default=0, init=False)  # distinct: libzmq tells of the first and the end of the last

    def open(self) -> None:
        """Opens the sockets. Raises `zmq.ZMQError` when an address cannot be bound; nothing is left open then."""
        try:
            self._pub = self.context.socket(zmq.XPUB)
            self._pub.set_hwm(HIGH_WATER_MARK)
            self._pub.linger = 0
            if self.bind:
                self._pub.bind(self.endpoint)
                self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
            else:
                self._pub.connect(self.endpoint)
            if self.replay_endpoint is not None:
                self._router = zmq.asyncio.Context(self.context).socket(zmq.ROUTER)
                self._router.linger = 0
                self._router.bind(self.replay_endpoint)
                self.replay_endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        except zmq.ZMQError:
            self._close_sockets()
            raise

    def start(self) -> None:
        """Begins to answer replays. Needs a running event loop."""
        if self._router is not None:
            self._serving = asyncio.create_task(self._serve_replays(self._router))

    @property
    def subscribed(self) -> bool:
        """Whether anybody hears what is published from now on."""
        self._take_subscriptions()
        return self._subscriptions > 0

    def publish(self, payload: bytes) -> int:
        """Sends one batch and returns its sequence number."""
        seq = self.next_seq
        self.next_seq += 1
        self._buffer.append((seq, payload))
        faults = self.faults
        if faults.drop > 0:
            faults.drop -= 1
            return seq
        if faults.swap > 0 and not self._held_back:
            faults.swap -= 1
            self._held_back.append((seq, payload))
            return seq
        self._send(seq, payload)
        if faults.duplicate > 0:
            faults.duplicate -= 1
            self._send(seq, payload)
        while self._held_back:
            self._send(*self._held_back.pop())
        return seq

    async def close(self) -> None:
        """Closes the sockets at once: what was not yet sent is lost, as with a killed process."""
        if self._serving is not None:
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
            self._serving = None
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._pub is not None:
            self._pub.close(linger=0)
            self._pub = None
        if self._router is not None:
            self._router.close(linger=0)
            self._router = None

    def _send(self, seq: int, payload: bytes) -> None:
        assert self._pub is not None, "publish before open"
        self._take_subscriptions()  # so that none pile up
        self._pub.send_multipart((self.topic.encode(), seq.to_bytes(8, "big"), payload))

    def _take_subscriptions(self) -> None:
        while self._pub is not None and int(self._pub.get(zmq.EVENTS)) & zmq.POLLIN:
            told = self._pub.recv(zmq.DONTWAIT)[:1]
            self._subscriptions += (told == b"\x01") - (told == b"\x00")

    async def _serve_replays(self, router: zmq.asyncio.Socket) -> None:
        while True:
            request = await router.recv_multipart()
            if len(request) != 3 or len(request[2]) != 8:
                log.warning("replay request of %d frames ignored: [id, empty, 8-byte sequence] expected", len(request))
                continue
            if self.faults.replay is not ReplayFault.SILENT:
                await self._replay(router, request[0], int.from_bytes(request[2], "big"))

    async def _replay(self, router: zmq.asyncio.Socket, client: bytes, start: int) -> None:
        fault = self.faults.replay
        wanted = [(seq, payload) for seq, payload in self._buffer if seq >= start]
        if fault is ReplayFault.TRUNCATED:
            wanted = wanted[: len(wanted) // 2]
        topic = self.topic.encode()
        for seq, payload in wanted:
            await router.send_multipart((client, b"", topic, seq.to_bytes(8, "big"), payload))
        if fault is not ReplayFault.ENDLESS:
            await router.send_multipart((client, b"", b"", END_MARKER, b""))
