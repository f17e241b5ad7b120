"""What stands between the processes and can be cut: a TCP relay, and a relay of ZeroMQ frames that loses some.

A relay of bytes is the network: *cut*, nothing arrives any more and nobody is told (connections stay open, silent, and
new ones are not answered), as when a switch dies; or it is a service: connections go to the first target that takes
them. A relay of frames knows what a message is, so it can lose, repeat and reorder them whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

CHUNK = 1 << 16


class TcpRelay:
    """Listens on a free port and passes on to the first of `targets()` (`host:port`) that can be reached."""

    def __init__(self, targets: Callable[[], Sequence[str]]) -> None:
        self.address = ""
        self._targets = targets
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self._open.clear()

    def mend(self) -> None:
        """What is on its way goes on: the endpoints' own timeouts decide what is left of their connections."""
        self._open.set()

    async def close(self) -> None:
        self._open.set()
        if self._server is not None:
            self._server.close()
            self._server = None
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        task.add_done_callback(lambda _: writer.close())  # also of one cancelled before it began
        if self._server is None:
            task.cancel()  # accepted while the relay was being closed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # an end is gone: so is the connection
            await self._open.wait()
            if (there := await self._reach()) is not None:
                await self._link(reader, writer, *there)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for target in self._targets():
            host, _, port = target.rpartition(":")
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(host, int(port))
        return None

    async def _link(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Until either end closes: then so does the other, as a broken TCP connection ends on both sides."""
        ways = [
            asyncio.create_task(self._pass_on(reader, far_writer)),
            asyncio.create_task(self._pass_on(far_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        await self._open.wait()


@dataclass(frozen=True, slots=True)
class FrameFaults:
    """Shares of messages, 0..1, to which each happens. A message that is late comes after the one that followed it."""

    lost: float = 0.0
    twice: float = 0.0
    late: float = 0.0


@dataclass(slots=True)
class FrameCounts:
    passed: int = 0
    lost: int = 0
    twice: int = 0
    late: int = 0

    @property
    def hit(self) -> int:
        return self.lost + self.twice + self.late


class Misfortune:
    """Decides what becomes of each message. `faults` may be changed at any time."""

    def __init__(self, seed: int) -> None:
        self.faults = FrameFaults()
        self.counts = FrameCounts()
        self._chance = random.Random(seed)
        self._held: list[bytes] | None = None

    def after(self, message: list[bytes]) -> list[list[bytes]]:
        """The messages to pass on now that this one has come."""
        faults, draw = self.faults, self._chance.random()
        held, self._held = self._held, None
        if draw < faults.lost:
            self.counts.lost += 1
            out = []
        elif draw < faults.lost + faults.twice:
            self.counts.twice += 1
            out = [message, message]
        elif draw < faults.lost + faults.twice + faults.late and held is None:
            self.counts.late += 1
            self._held = message
            out = []
        else:
            self.counts.passed += 1
            out = [message]
        return out if held is None else [*out, held]


class FrameRelay:
    """Between one engine's PUB socket and who subscribes to it. `frames` says what goes wrong.

    Engines that bind are dialled at `source`; with `source` None the relay binds, and the engine connects to `inlet`.
    With `sink` None it binds, and indexers dial `outlet`; else it connects there, as such an engine would have.
    """

    def __init__(self, *, source: str | None, sink: str | None, seed: int) -> None:
        self.inlet = self.outlet = ""
        self.frames = Misfortune(seed)
        self._source, self._sink = source, sink
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._relaying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        sub, pub = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        for socket in (sub, pub):
            socket.set_hwm(0)
            socket.linger = 0
        sub.subscribe(b"")
        self.inlet = _attach(sub, self._source)
        self.outlet = _attach(pub, self._sink)
        self._relaying = asyncio.create_task(self._relay(sub, pub))

    async def close(self) -> None:
        if self._relaying is not None:
            self._relaying.cancel()
            await asyncio.gather(self._relaying, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _relay(self, sub: zmq.asyncio.Socket, pub: zmq.asyncio.Socket) -> None:
        while True:
            for message in self.frames.after(await sub.recv_multipart()):
                await pub.send_multipart(message)


def _attach(socket: zmq.asyncio.Socket, endpoint: str | None) -> str:
    if endpoint is not None:
        socket.connect(endpoint)
        return endpoint
    socket.bind("tcp://127.0.0.1:0")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
