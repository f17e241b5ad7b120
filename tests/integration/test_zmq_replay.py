"""Replay against a ROUTER that serves it as vLLM's publisher does, and against ones that do it badly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.replay_client import ReplayClient, ReplayOptions, ReplayOutcome, ReplayResult
from kvatlas_indexer.adapters.zmq_sockets import Context, Socket, new_context

ENGINE = EngineId("10.0.0.1:8000")
END = b"\xff" * 8
QUICK = ReplayOptions(answer_s=0.3, deadline_s=0.6)

Frames = list[bytes]
Answer = Callable[[int], list[Frames]]  # to the nth request: what follows the client's id


def payload(sequence: int) -> bytes:
    return b"batch %d" % sequence


class Engine:
    """The replay side of vLLM 0.32's `ZmqEventPublisher`: a ROUTER served by one thread, `buffer` the batches it has.

    `spoil(n, frames)` changes the frames of its nth answer before they are sent.
    """

    topic: bytes | None = b"kv@10.0.0.1@m"

    def __init__(self, context: Context, buffer: range) -> None:
        self.buffer = buffer
        self.requests: list[int] = []
        self.spoil: Callable[[int, list[Frames]], list[Frames]] = lambda _, frames: frames
        self._router: Socket = context.socket(zmq.ROUTER)
        self._router.bind("tcp://127.0.0.1:*")
        self.endpoint = self._router.get_string(zmq.LAST_ENDPOINT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._router.poll(20):
                client, _, first = self._router.recv_multipart()
                self.requests.append(int.from_bytes(first, "big"))
                answer = self.spoil(len(self.requests), self._answer(self.requests[-1]))
                for frames in answer:
                    self._router.send_multipart([client, *frames])
        self._router.close(linger=0)

    def _answer(self, first: int) -> list[Frames]:
        topic, end_topic = ([], []) if self.topic is None else ([self.topic], [b""])
        batches = [[b"", *topic, s.to_bytes(8, "big"), payload(s)] for s in self.buffer if s >= first]
        return [*batches, [b"", *end_topic, END, b""]]


@pytest.fixture
def context() -> Iterator[Context]:
    context = new_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def engine(context: Context) -> Iterator[Engine]:
    engine = Engine(context, range(100))
    yield engine
    engine.close()


async def replayed(
    context: Context, engine: Engine, first: int, options: ReplayOptions | None = None
) -> tuple[ReplayResult, list[int]]:
    """The replay's end, and the sequences handed on. Payloads are those of their sequence."""
    got: list[int] = []

    def on_batch(sequence: int, received: bytes) -> None:
        assert received == payload(sequence)
        got.append(sequence)

    return await ReplayClient(context, options).replay(ENGINE, engine.endpoint, first, on_batch), got


def complete(sequences: range) -> tuple[ReplayResult, list[int]]:
    size = sum(len(payload(s)) for s in sequences)
    return ReplayResult(ReplayOutcome.COMPLETE, len(sequences), size), list(sequences)


@pytest.mark.parametrize("topic", [b"kv@10.0.0.1@m", b"", None], ids=["topic", "empty topic", "no topic frame"])
async def test_everything_from_the_sequence_asked_for(context: Context, engine: Engine, topic: bytes | None) -> None:
    engine.topic = topic
    assert await replayed(context, engine, 40) == complete(range(40, 100))


async def test_an_engine_that_has_forgotten_the_first_starts_later(context: Context, engine: Engine) -> None:
    engine.buffer = range(90, 100)
    assert await replayed(context, engine, 40) == complete(range(90, 100))


async def test_nothing_to_replay_is_complete_too(context: Context, engine: Engine) -> None:
    assert await replayed(context, engine, 100) == complete(range(0))


async def test_ten_thousand_batches_reach_a_slow_reader(context: Context, engine: Engine) -> None:
    """A ROUTER drops what a peer's queue has no room for: none may be missing, however late the reader reads."""
    engine.buffer = range(10_000)
    assert await replayed(context, engine, 0, ReplayOptions(turn_s=0.0)) == complete(range(10_000))


async def test_a_hole_is_asked_for_again(context: Context, engine: Engine) -> None:
    engine.spoil = lambda n, frames: [*frames[:10], *frames[20:]] if n == 1 else frames
    assert await replayed(context, engine, 0) == complete(range(100))
    assert engine.requests == [0, 10]


async def test_a_hole_that_does_not_close_truncates(context: Context, engine: Engine) -> None:
    engine.spoil = lambda _, frames: [f for f in frames if f[-1] != payload(10)]
    end, got = await replayed(context, engine, 0)
    assert (end.outcome, got) == (ReplayOutcome.TRUNCATED, list(range(10)))
    assert "no batch 10, but later ones" in end.why


async def test_duplicates_are_handed_on_once(context: Context, engine: Engine) -> None:
    engine.spoil = lambda _, frames: [*frames[:50], *frames[:50], *frames[50:]]
    assert await replayed(context, engine, 0) == complete(range(100))


async def test_without_an_end_it_is_truncated(context: Context, engine: Engine) -> None:
    engine.spoil = lambda _, frames: frames[:-1]
    end, got = await replayed(context, engine, 0, QUICK)
    assert (end.outcome, end.batches, got) == (ReplayOutcome.TRUNCATED, 100, list(range(100)))
    assert "no end after" in end.why


@pytest.mark.parametrize(
    ("options", "expected"),
    [(ReplayOptions(batches_max=30), 30), (ReplayOptions(bytes_max=10 * len(payload(0))), 10)],
    ids=["batches", "bytes"],
)
async def test_limits_truncate(context: Context, engine: Engine, options: ReplayOptions, expected: int) -> None:
    end, got = await replayed(context, engine, 0, options)
    assert (end.outcome, got) == (ReplayOutcome.TRUNCATED, list(range(expected)))
    assert end.why.startswith("more than")


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"no delimiter", b"12345678", b""], [b"", b"t", b"seven77", b""], [b"", b"t", b"12345678", b"", b""]],
    ids=["one frame", "no delimiter", "short sequence", "too many frames"],
)
async def test_an_answer_that_is_none_is_malformed(context: Context, engine: Engine, frames: Frames) -> None:
    engine.spoil = lambda _, answer: [*answer[:3], frames, *answer[3:]]
    end, got = await replayed(context, engine, 0)
    assert (end.outcome, got) == (ReplayOutcome.MALFORMED, [0, 1, 2])


async def test_nobody_there_is_refused(context: Context, engine: Engine) -> None:
    engine.close()
    end, got = await replayed(context, engine, 0, QUICK)
    assert (end.outcome, got) == (ReplayOutcome.REFUSED, [])


async def test_an_engine_that_says_nothing_is_refused(context: Context, engine: Engine) -> None:
    engine.spoil = lambda _, frames: []
    end, _ = await replayed(context, engine, 0, QUICK)
    assert end == ReplayResult(ReplayOutcome.REFUSED, 0, 0, "no answer within 0.3 s")


async def test_a_server_of_another_kind_is_refused(context: Context) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(http, "127.0.0.1", 0) as server:
        endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        end = await ReplayClient(context, QUICK).replay(ENGINE, endpoint, 0, lambda *_: None)
    assert end.outcome is ReplayOutcome.REFUSED


async def test_an_endpoint_that_makes_no_sense_is_refused_by_name(context: Context) -> None:
    end = await ReplayClient(context, QUICK).replay(ENGINE, "tcp://nowhere", 0, lambda *_: None)
    assert end.outcome is ReplayOutcome.REFUSED
    assert "'tcp://nowhere'" in end.why


async def test_one_replay_per_engine_and_so_many_in_all(context: Context, engine: Engine) -> None:
    engine.spoil = lambda n, frames: frames if n > 1 else []
    client = ReplayClient(context, ReplayOptions(concurrent_max=1, answer_s=1.0))
    first = asyncio.create_task(client.replay(ENGINE, engine.endpoint, 0, lambda *_: None))
    second = asyncio.create_task(client.replay(EngineId("other:1"), engine.endpoint, 99, lambda *_: None))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match=r"10\.0\.0\.1:8000 is under way"):
        await client.replay(ENGINE, engine.endpoint, 0, lambda *_: None)
    assert (await first).outcome is ReplayOutcome.REFUSED
    assert (await second).batches == 1
    assert engine.requests == [0, 99]


async def test_cancelling_ends_it_and_lets_the_next_begin(context: Context, engine: Engine) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def silent_once(n: int, frames: list[Frames]) -> list[Frames]:
        loop.call_soon_threadsafe(asked.set)
        return frames if n > 1 else []

    engine.spoil = silent_once
    client = ReplayClient(context, ReplayOptions(concurrent_max=1))
    task = asyncio.create_task(client.replay(ENGINE, engine.endpoint, 0, lambda *_: None))
    async with asyncio.timeout(30):
        await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await client.replay(ENGINE, engine.endpoint, 0, lambda *_: None)).batches == 100
