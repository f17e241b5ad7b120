"""A simulated engine's events over real ZeroMQ: whoever applies them all holds the engine's cache."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import zmq
import zmq.asyncio

from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import BlockRemoved, BlockStored, EventBatch
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.events import WireVersion
from kvatlas_loadtest.publisher import END_MARKER, EventPublisher, ReplayFault, binds, rank_endpoint
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.engine_kit import simulated_engine
from tests.integration.processes import until

TIGHT = EngineLimits(num_blocks=40, block_size=16)


class Sockets:
    """Keeps the sockets of a test: one that is collected before it is closed is an error."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._opened: list[zmq.asyncio.Socket] = []

    def socket(self, kind: int) -> zmq.asyncio.Socket:
        self._opened.append(self._context.socket(kind))
        return self._opened[-1]

    def close(self) -> None:
        for socket in self._opened:
            socket.close(linger=0)
        self._context.term()


@asynccontextmanager
async def sockets() -> AsyncIterator[Sockets]:
    kept = Sockets()
    try:
        yield kept
    finally:
        kept.close()


async def received(socket: zmq.asyncio.Socket) -> tuple[bytes, int, EventBatch]:
    async with asyncio.timeout(30):
        topic, seq, payload = await socket.recv_multipart()
    return topic, int.from_bytes(seq, "big"), decode_batch(payload)


async def subscribed(context: Sockets, engine: SimulatedEngine, rank: int = 0) -> zmq.asyncio.Socket:
    """A subscription the engine is known to have seen: an event of a request of its own has come through."""
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"")
    assert engine.events_endpoint is not None
    socket.connect(rank_endpoint(engine.events_endpoint, rank))
    await flush(socket, engine, rank)
    return socket


async def flush(socket: zmq.asyncio.Socket, engine: SimulatedEngine, rank: int = 0) -> list[tuple[int, EventBatch]]:
    """Everything up to the event of one more request, which nobody else asks; sent again until it is seen."""
    messages: list[tuple[int, EventBatch]] = []
    async with asyncio.timeout(30):
        while True:
            marker = 7000 + engine.publisher(rank).next_seq % 900
            await ask(engine, [marker] * 17, rank=rank)
            while await socket.poll(50):
                _, seq, batch = await received(socket)
                messages.append((seq, batch))
                if any(isinstance(e, BlockStored) and e.token_ids()[0] == marker for e in batch.events):
                    return messages


async def ask(engine: SimulatedEngine, prompt: list[int], rank: int = 0, **body: Any) -> Any:
    async with (
        aiohttp.ClientSession(engine.url) as session,
        session.post(
            "/v1/completions",
            json={"prompt": prompt, "max_tokens": 2, **body},
            headers={"X-data-parallel-rank": str(rank)},
        ) as response,
    ):
        assert response.status == 200
        return await response.json()


async def some_traffic(engine: SimulatedEngine, rank: int = 0) -> None:
    """Enough for hits, copies and evictions in a `TIGHT` pool."""
    for family in (100, 200, 100, 300, 400, 100, 200):
        await ask(engine, [family + i for i in range(160)], rank=rank, cache_salt="s" if family == 300 else None)


def apply(index: Counter[int], batch: EventBatch) -> None:
    for event in batch.events:
        if isinstance(event, BlockStored):
            index.update(event.keys)
        elif isinstance(event, BlockRemoved):
            index.subtract(event.keys)
        else:
            index.clear()


@pytest.mark.parametrize(
    ("version", "as_bytes"), [*((v, False) for v in WireVersion), (WireVersion.V0_12, True), (WireVersion.V0_32, True)]
)
async def test_the_events_are_the_cache(version: WireVersion, as_bytes: bool) -> None:
    config = EngineConfig(
        version=version,
        hash_algorithm="sha256_cbor_64bit" if version is WireVersion.V0_10 else "sha256_cbor",
        hash_seed="42",
        hashes_as_bytes=as_bytes,
        limits=TIGHT,
        time_model=NO_TIME,
    )
    async with sockets() as context, simulated_engine(config) as engine:
        index: Counter[int] = Counter()
        socket = context.socket(zmq.DEALER)
        await some_traffic(engine)
        async with aiohttp.ClientSession(engine.url) as session, session.post("/reset_prefix_cache") as response:
            assert await response.json() == {"success": True}
        await some_traffic(engine)
        assert engine.replay_endpoint is not None
        socket.connect(engine.replay_endpoint)
        batches = await replayed(socket)
        assert [seq for seq, _ in batches] == list(range(engine.publisher().next_seq))
        for _, batch in batches:
            assert batch.rejected == ()
            apply(index, batch)
        assert +index == Counter(engine.block_table())
        stored = [e for _, b in batches for e in b.events if isinstance(e, BlockStored)]
        assert all((e.full is not None) == as_bytes for e in stored)
        assert sum(isinstance(e, BlockRemoved) for _, b in batches for e in b.events) > 10


async def replayed(socket: zmq.asyncio.Socket, start: int = 0) -> list[tuple[int, EventBatch]]:
    """What the engine remembers from `start` on; the end marker must come."""
    await socket.send_multipart([b"", start.to_bytes(8, "big")])
    batches: list[tuple[int, EventBatch]] = []
    async with asyncio.timeout(30):
        while True:
            empty, _, seq, payload = await socket.recv_multipart()
            assert empty == b""
            if seq == END_MARKER:
                return batches
            batches.append((int.from_bytes(seq, "big"), decode_batch(payload)))


async def test_an_engine_connects_to_an_indexer_that_listens() -> None:
    async with sockets() as context:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        config = EngineConfig(
            events_endpoint=f"tcp://127.0.0.1:{port}", replay_endpoint=None, time_model=NO_TIME, limits=TIGHT
        )
        async with simulated_engine(config) as engine:
            await flush(socket, engine)
            await ask(engine, list(range(40)))
            topic, _, batch = await received(socket)
            assert topic == f"kv@{engine.address}@tiny".encode()
            assert batch.rank == 0
            (stored,) = batch.events
            assert isinstance(stored, BlockStored)
            assert stored.token_ids() == list(range(32))


async def test_each_rank_publishes_on_its_own_port() -> None:
    config = EngineConfig(data_parallel_size=3, time_model=NO_TIME, limits=TIGHT)
    async with sockets() as context, simulated_engine(config) as engine:
        for rank in (2, 1):
            socket = await subscribed(context, engine, rank)
            await ask(engine, list(range(40)), rank=rank)
            topic, _, batch = await received(socket)
            assert (topic.decode(), batch.rank) == (engine.topic, rank)


async def test_messages_are_dropped_doubled_and_swapped_on_request() -> None:
    config = EngineConfig(time_model=NO_TIME)
    async with sockets() as context, simulated_engine(config) as engine:
        socket = await subscribed(context, engine)
        publisher = engine.publisher()
        for fault, arrives in (("drop", [1, 2]), ("duplicate", [0, 0, 1, 2]), ("swap", [1, 0, 2])):
            start = publisher.next_seq
            setattr(publisher.faults, fault, 1)
            for number in range(3):
                await ask(engine, [start + number] * 17)
            assert [(await received(socket))[1] - start for _ in arrives] == arrives
        replay = context.socket(zmq.DEALER)
        assert engine.replay_endpoint is not None
        replay.connect(engine.replay_endpoint)
        assert [seq for seq, _ in await replayed(replay)] == list(range(publisher.next_seq))  # all is remembered


async def test_replays_fail_on_request() -> None:
    async with sockets() as context, simulated_engine(EngineConfig(time_model=NO_TIME)) as engine:
        for number in range(4):
            await ask(engine, [number] * 17)
        assert engine.replay_endpoint is not None
        faults = engine.publisher().faults
        for fault, answered, ends in (
            (ReplayFault.SILENT, 0, 0),
            (ReplayFault.TRUNCATED, 1, 1),
            (ReplayFault.ENDLESS, 2, 0),
        ):
            faults.replay = fault
            socket = context.socket(zmq.DEALER)
            socket.connect(engine.replay_endpoint)
            await socket.send_multipart([b"", (2).to_bytes(8, "big")])
            async with asyncio.timeout(30):
                frames = [await socket.recv_multipart() for _ in range(answered + ends)]
            assert not await socket.poll(100), "and nothing else"
            ended = sum(frame[2] == END_MARKER for frame in frames)
            assert (len(frames) - ended, ended) == (answered, ends)
        faults.replay = ReplayFault.NONE
        socket = context.socket(zmq.DEALER)
        socket.connect(engine.replay_endpoint)
        await socket.send_multipart([b"what is this"])  # ignored, not fatal
        assert [seq for seq, _ in await replayed(socket, 2)] == [2, 3]
        assert await replayed(socket, 99) == []


async def test_whether_anybody_listens_is_known() -> None:
    """What is published from then on arrives; what was before, nobody has heard."""
    async with sockets() as context, simulated_engine(EngineConfig(time_model=NO_TIME)) as engine:
        publisher, socket = engine.publisher(), context.socket(zmq.SUB)
        await ask(engine, [1] * 17)
        assert not publisher.subscribed
        assert engine.events_endpoint is not None
        socket.subscribe(b"")
        socket.connect(engine.events_endpoint)
        await until(lambda: publisher.subscribed, "the subscription")
        await ask(engine, [2] * 17)
        assert (await received(socket))[1] == 1
        socket.close(linger=0)
        await until(lambda: not publisher.subscribed, "its end")


async def test_a_restart_begins_a_new_sequence_on_the_same_ports() -> None:
    config = EngineConfig(time_model=NO_TIME, data_parallel_size=2)
    async with sockets() as context, simulated_engine(config) as engine:
        await ask(engine, list(range(40)))
        before = (engine.url, engine.events_endpoint, engine.replay_endpoint, engine.topic)
        for first_seq in (0, 41):
            await engine.restart(first_seq)
            assert (engine.url, engine.events_endpoint, engine.replay_endpoint, engine.topic) == before
            await ask(engine, list(range(40)))
            socket = context.socket(zmq.DEALER)
            assert engine.replay_endpoint is not None
            socket.connect(engine.replay_endpoint)
            assert [seq for seq, _ in await replayed(socket)] == [first_seq]


async def test_an_address_in_use_is_an_error_and_leaves_nothing_open() -> None:
    async with simulated_engine(EngineConfig(time_model=NO_TIME)) as engine:
        taken = engine.events_endpoint
        assert taken is not None
        publisher = EventPublisher(zmq.Context.instance(), taken, bind=True)
        with pytest.raises(zmq.ZMQError, match="in use"):
            publisher.open()
        port = int(engine.address.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            await simulated_engine(EngineConfig(port=port, time_model=NO_TIME)).start()


def test_which_endpoints_bind_and_where_ranks_are() -> None:
    assert [binds(e) for e in ("tcp://*:5557", "tcp://[::]:5557", "ipc:///tmp/x", "tcp://127.0.0.1:0")] == [True] * 4
    assert not binds("tcp://indexer:5557")
    assert rank_endpoint("tcp://*:5557", 0) == "tcp://*:5557"
    assert rank_endpoint("tcp://*:5557", 3) == "tcp://*:5560"
    assert rank_endpoint("tcp://127.0.0.1:0", 3) == "tcp://127.0.0.1:0"
    assert rank_endpoint("inproc://cache", 2) == "inproc://cache_dp2"
