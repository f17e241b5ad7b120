"""Event messages over real sockets: both ways in, ranks, strangers on the port, and a share of the loop for others."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import zmq

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.addresses import AddressUnavailable
from kvatlas_indexer.adapters.zmq_sockets import Context, Socket, new_context
from kvatlas_indexer.adapters.zmq_source import Origin, ZmqSource, ZmqSourceOptions

DEADLINE_S = 30.0  # far more than is needed: machines are shared
ENGINE = EngineId("10.0.0.1:8000")
OTHER = EngineId("10.0.0.1:8000", 1)


class Inbox:
    """What a source handed on; `until` waits for a condition on it."""

    def __init__(self) -> None:
        self.messages: list[tuple[Origin, list[bytes]]] = []
        self.sources: list[ZmqSource[list[bytes]]] = []
        self._came = asyncio.Event()

    def __call__(self, origin: Origin, frames: list[bytes]) -> None:
        self.messages.append((origin, frames))
        self._came.set()

    def payloads(self, origin: Callable[[Origin], bool] = lambda _: True) -> list[bytes]:
        return [frames[-1] for o, frames in self.messages if origin(o)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._came.clear()
                await self._came.wait()


class Engines:
    """Publishers as engines have them, but XPUB ones: they can tell when they have been subscribed to."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sockets: list[Socket] = []

    def connect(self, endpoint: str) -> Socket:
        socket = self._socket()
        socket.connect(endpoint)
        return socket

    def bind(self, endpoint: str = "tcp://127.0.0.1:*") -> tuple[Socket, str]:
        socket = self._socket()
        socket.bind(endpoint)
        return socket, socket.get_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        for engine in self._sockets:
            engine.close(linger=0)

    def _socket(self) -> Socket:
        self._sockets.append(self._context.socket(zmq.XPUB))
        return self._sockets[-1]


@pytest.fixture
def context() -> Iterator[Context]:
    context = new_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def engines(context: Context) -> Iterator[Engines]:
    engines = Engines(context)
    yield engines
    engines.close()


@pytest.fixture
async def inbox() -> AsyncIterator[Inbox]:
    inbox = Inbox()
    yield inbox
    for source in inbox.sources:
        source.close()


def make_source(context: Context, inbox: Inbox, options: ZmqSourceOptions | None = None) -> ZmqSource[list[bytes]]:
    source = ZmqSource(context, list, inbox, options or ZmqSourceOptions())
    inbox.sources.append(source)
    return source


async def subscribed(publisher: Socket) -> None:
    """Waits until a subscriber's subscription has reached an XPUB: what is sent before that is lost, by design."""
    async with asyncio.timeout(DEADLINE_S):
        while not publisher.poll(0):
            await asyncio.sleep(0.005)
    publisher.recv()


async def released(endpoint: str) -> None:
    """Waits until nobody listens there: libzmq closes a listener in a thread of its own."""
    address = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(*address)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # caught in the act of closing
                continue
            writer.close()


def send(socket: Socket, topic: bytes, sequence: int, payload: bytes) -> None:
    socket.send_multipart([topic, sequence.to_bytes(8, "big"), payload])


async def test_a_listened_message_says_its_port_and_its_peer(context: Context, engines: Engines, inbox: Inbox) -> None:
    first, second = make_source(context, inbox).listen(("tcp://127.0.0.1:0",), ranks=2)
    for rank, endpoint in enumerate((first, second)):
        engine = engines.connect(endpoint)
        await subscribed(engine)
        send(engine, b"kv@10.0.0.1@m", 7, b"of rank %d" % rank)
    await inbox.until(lambda: len(inbox.messages) == 2)
    assert inbox.messages == [
        (Origin(first, "127.0.0.1", None, 0), [b"kv@10.0.0.1@m", (7).to_bytes(8, "big"), b"of rank 0"]),
        (Origin(second, "127.0.0.1", None, 1), [b"kv@10.0.0.1@m", (7).to_bytes(8, "big"), b"of rank 1"]),
    ]


async def test_peers_of_one_port_are_told_apart(context: Context, engines: Engines, inbox: Inbox) -> None:
    (endpoint,) = make_source(context, inbox).listen(("tcp://*:0",))
    port = endpoint.rpartition(":")[2]
    for source in ("127.0.0.2", "127.0.0.3"):
        engine = engines.connect(f"tcp://{source}:0;127.0.0.1:{port}")
        await subscribed(engine)
        send(engine, b"t", 0, source.encode())
    await inbox.until(lambda: len(inbox.messages) == 2)
    assert [(o.peer, frames[-1].decode()) for o, frames in inbox.messages] == [
        ("127.0.0.2", "127.0.0.2"),
        ("127.0.0.3", "127.0.0.3"),
    ]


async def test_a_dialled_engine_is_the_origin_whatever_its_topic_says(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    source = make_source(context, inbox)
    bound = {ENGINE: engines.bind(), OTHER: engines.bind()}
    assert source.set_dialled({e: endpoint for e, (_, endpoint) in bound.items()}) == {}
    for engine, (sock, _) in bound.items():
        await subscribed(sock)
        send(sock, b"kv@somebody-else@m", 0, str(engine).encode())
    await inbox.until(lambda: len(inbox.messages) == 2)
    assert {o: frames[-1].decode() for o, frames in inbox.messages} == {
        Origin(endpoint, None, e, e.rank): str(e) for e, (_, endpoint) in bound.items()
    }


async def test_discovery_adds_moves_and_removes_dialled_engines(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    source = make_source(context, inbox)
    (old, old_endpoint), (new, new_endpoint) = engines.bind(), engines.bind()
    source.set_dialled({ENGINE: old_endpoint})
    await subscribed(old)
    source.set_dialled({ENGINE: old_endpoint})  # unchanged: the connection stays, nothing is lost
    send(old, b"t", 0, b"old")
    await inbox.until(lambda: inbox.payloads() == [b"old"])

    source.set_dialled({ENGINE: new_endpoint})
    await subscribed(new)
    send(new, b"t", 0, b"new")
    await inbox.until(lambda: inbox.payloads() == [b"old", b"new"])
    await subscribed(old)  # the subscription was taken back
    source.set_dialled({})
    await subscribed(new)


async def test_an_engine_that_is_not_up_yet_is_dialled_until_it_is(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        source = make_source(context, inbox, ZmqSourceOptions(reconnect_s=0.02, reconnect_max_s=0.1))
        source.set_dialled({ENGINE: endpoint})
    engine, _ = engines.bind(endpoint)
    await subscribed(engine)
    send(engine, b"t", 0, b"here I am")
    await inbox.until(lambda: inbox.payloads() == [b"here I am"])


async def test_an_endpoint_that_makes_no_sense_is_named_and_hurts_no_other(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    source = make_source(context, inbox)
    engine, endpoint = engines.bind()
    refused = source.set_dialled({OTHER: "tcp://nowhere", ENGINE: endpoint})
    assert list(refused) == [OTHER]
    assert "'tcp://nowhere' cannot be dialled" in refused[OTHER]
    await subscribed(engine)


STRANGERS = {
    "http": b"GET /metrics HTTP/1.1\r\nHost: indexer\r\n\r\n",
    "random": os.urandom(4096),
    "zeros": bytes(4096),
    "a huge frame": b"\xff" + (1 << 62).to_bytes(8, "big") + b"\x7f" + b"x" * 4096,
    "half a greeting": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03",
}


@pytest.mark.parametrize("garbage", STRANGERS.values(), ids=STRANGERS)
async def test_a_stranger_on_the_port_disturbs_nobody(
    context: Context, engines: Engines, inbox: Inbox, garbage: bytes
) -> None:
    (endpoint,) = make_source(context, inbox).listen(("tcp://127.0.0.1:0",))

    def heard() -> list[bytes]:  # what libzmq makes of the stranger's bytes may be handed on too
        return [frames[-1] for _, frames in inbox.messages if frames[0] == b"kv@a"]

    engine = engines.connect(endpoint)
    await subscribed(engine)
    send(engine, b"kv@a", 0, b"before")
    await inbox.until(lambda: heard() == [b"before"])
    with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as stranger:
        stranger.sendall(garbage)
        send(engine, b"kv@a", 1, b"during")
        await inbox.until(lambda: heard() == [b"before", b"during"])
    send(engine, b"kv@a", 2, b"after")
    await inbox.until(lambda: heard() == [b"before", b"during", b"after"])


async def test_frames_of_any_number_are_handed_on(context: Context, engines: Engines, inbox: Inbox) -> None:
    (endpoint,) = make_source(context, inbox).listen(("tcp://127.0.0.1:0",))
    engine = engines.connect(endpoint)
    await subscribed(engine)
    shapes = [[b""], [b"t", b""], [b"t", b"1", b"2", b"3", b"4"]]
    for frames in shapes:
        engine.send_multipart(frames)
    await inbox.until(lambda: len(inbox.messages) == len(shapes))
    assert [frames for _, frames in inbox.messages] == shapes


async def test_a_message_too_long_is_not_taken_and_the_engine_comes_back(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    (endpoint,) = make_source(context, inbox, ZmqSourceOptions(message_bytes_max=10_000)).listen(("tcp://127.0.0.1:0",))
    engine = engines.connect(endpoint)
    await subscribed(engine)
    send(engine, b"t", 0, bytes(10_001))
    async with asyncio.timeout(DEADLINE_S):
        while not inbox.messages:  # what is sent before it has connected again may be lost
            send(engine, b"t", 1, b"short again")
            await asyncio.sleep(0.02)
    assert set(inbox.payloads()) == {b"short again"}


async def test_a_bug_behind_the_callback_costs_one_message(context: Context, engines: Engines, inbox: Inbox) -> None:
    def on_message(origin: Origin, frames: list[bytes]) -> None:
        inbox(origin, frames)
        if frames[-1] == b"bad":
            raise RuntimeError("a bug")

    source = ZmqSource(context, list, on_message)
    inbox.sources.append(source)
    (endpoint,) = source.listen(("tcp://127.0.0.1:0",))
    engine = engines.connect(endpoint)
    await subscribed(engine)
    for payload in (b"bad", b"good", b"bad", b"good"):
        send(engine, b"t", 0, payload)
    await inbox.until(lambda: len(inbox.messages) == 4)
    assert (source.received.messages, source.received.failures) == (4, 2)


async def test_a_rounds_messages_are_read_before_the_first_is_handed_on(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    """All are sent before the loop runs again. What cannot be read for a bug costs itself. Each turn is told of."""
    seen = ""

    def note(what: str) -> None:
        nonlocal seen
        seen += what

    def read(frames: list[bytes]) -> list[bytes]:
        note("r")
        if frames[-1] == b"7":
            raise RuntimeError("a bug")
        return frames

    def on_message(origin: Origin, frames: list[bytes]) -> None:
        note("m")
        inbox(origin, frames)

    options = ZmqSourceOptions(turn_s=0.0, round_messages_max=4)
    source = ZmqSource(context, read, on_message, options, on_turn=lambda: note("t"))
    inbox.sources.append(source)
    (endpoint,) = source.listen(("tcp://127.0.0.1:0",))
    engine = engines.connect(endpoint)
    await subscribed(engine)
    seen = ""
    for number in range(100):
        send(engine, b"t", number, b"%d" % number)
    await inbox.until(lambda: len(inbox.messages) == 99)
    assert inbox.payloads() == [b"%d" % number for number in range(100) if number != 7]
    assert (source.received.messages, source.received.failures) == (100, 1)
    assert "rrrrmmmmt" in seen
    assert "rrrrr" not in seen
    assert "mr" not in seen


async def test_a_flood_leaves_the_loop_and_the_quiet_engine_their_share(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    """Everything is sent before anything is read; then no turn takes more than its messages, and the quiet one is
    heard within the first rounds."""
    count = 2_000
    source = make_source(context, inbox, ZmqSourceOptions(turn_s=0.0, round_messages_max=4))
    flood, quiet = source.listen(("tcp://127.0.0.1:0",), ranks=2)
    flooding, speaking = engines.connect(flood), engines.connect(quiet)
    flooding.set_hwm(count)
    for engine in (flooding, speaking):
        await subscribed(engine)
    send(speaking, b"t", 0, b"quiet")
    for sequence in range(count):
        send(flooding, b"t", sequence, b"flood")
    seen_between_turns: list[int] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(inbox.messages) < count + 1:
            await asyncio.sleep(0)
            seen_between_turns.append(len(inbox.messages))
    steps = [b - a for a, b in itertools.pairwise(seen_between_turns)]
    assert max(steps) <= 4
    assert inbox.payloads().index(b"quiet") < count / 2
    sequences = [int.from_bytes(f[1], "big") for o, f in inbox.messages if o.port_rank == 0]
    assert sequences == list(range(count))


async def test_a_port_in_use_is_named_with_the_cure_and_nothing_stays_bound(
    context: Context, engines: Engines, inbox: Inbox
) -> None:
    (taken,) = make_source(context, inbox).listen(("tcp://127.0.0.1:0",))
    second = make_source(context, inbox)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        free = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    with pytest.raises(AddressUnavailable, match=rf"{taken}: the address is already in use.*--zmq-listen"):
        second.listen((free, taken))
    await released(free)


async def test_closing_ends_it_all(context: Context, engines: Engines, inbox: Inbox) -> None:
    source = make_source(context, inbox)
    (endpoint,) = source.listen(("tcp://127.0.0.1:0",))
    engine, dialled = engines.bind()
    source.set_dialled({ENGINE: dialled})
    await subscribed(engine)
    send(engine, b"t", 0, b"too late")
    source.close()
    source.close()
    again = make_source(context, inbox)
    await released(endpoint)
    assert again.listen((endpoint,)) == (endpoint,)
    assert inbox.messages == []
