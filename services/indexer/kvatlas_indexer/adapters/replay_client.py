"""Asks an engine for the event batches it still remembers.

The exchange, as vLLM 0.32 `ZmqEventPublisher._service_replay` serves it: a DEALER sends `[b"", first sequence]`; the
engine's ROUTER answers `[b"", topic, sequence, payload]` for every batch it still has from there on, oldest first, and
`[b"", b"", 8 x 0xff, b""]` at the end. Older engines and SGLang leave the topic frame out. The engine answers between
two of its own steps, so the first answer may take a while, and it remembers only so many batches (10,000 by default):
the first one answered may be later than the one asked for.

A ROUTER drops what its peer's queue has no room for (1,000 messages unless told otherwise) and says nothing, the end
marker included. So the receive queue here has no limit but `batches_max`, and a hole in the answer is asked for again
from where it begins, as long as every asking brings something new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

import zmq

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.zmq_sockets import MESSAGE_BYTES_MAX, Context, Socket, new_socket

END_SEQUENCE = b"\xff" * 8


class ReplayOutcome(StrEnum):
    COMPLETE = "complete"  # the end marker came, and nothing between the first batch and it is missing
    REFUSED = "refused"  # nobody answered
    TRUNCATED = "truncated"  # something came, but not the end: time, a limit, or a hole that would not close
    MALFORMED = "malformed"  # an answer that is none


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """How a replay ended. `batches` were handed on, of `bytes` in all; `why` is empty when it is complete."""

    outcome: ReplayOutcome
    batches: int
    bytes: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """`answer_s`: how long to wait for the first answer (vLLM looks for a request between steps, at least each 0.1 s).

    `deadline_s`, `batches_max`, `bytes_max`: of one replay, payloads only. `concurrent_max`: replays at once; further
    ones wait for their turn. `turn_s`: how long one turn may keep the event loop.
    """

    answer_s: float = 3.0
    deadline_s: float = 10.0
    batches_max: int = 20_000
    bytes_max: int = 1 << 30
    concurrent_max: int = 8
    message_bytes_max: int = MESSAGE_BYTES_MAX
    turn_s: float = 0.001


OnBatch = Callable[[int, bytes], None]


class _Ended(Exception):
    def __init__(self, outcome: ReplayOutcome, why: str = "") -> None:
        self.outcome, self.why = outcome, why


class ReplayClient:
    """The replays of an indexer. Used from one event loop."""

    def __init__(self, context: Context, options: ReplayOptions | None = None) -> None:
        self._context = context
        self._options = options or ReplayOptions()
        self._turns = asyncio.Semaphore(self._options.concurrent_max)
        self._in_flight: set[EngineId] = set()

    async def replay(self, engine: EngineId, endpoint: str, first_sequence: int, on_batch: OnBatch) -> ReplayResult:
        """Hand on the batches from `first_sequence` (or the oldest remembered) on, in order, each once, without holes.

        `on_batch(sequence, payload)` is called in the event loop. Cancelling ends the exchange. Raises `RuntimeError`
        when a replay of this engine is under way already: their batches would mix.
        """
        if engine in self._in_flight:
            raise RuntimeError(f"a replay of {engine} is under way already")
        self._in_flight.add(engine)
        try:
            async with self._turns:
                exchange = _Exchange(self._options, first_sequence, on_batch)
                try:
                    await exchange.run(self._context, endpoint)
                except _Ended as end:
                    return ReplayResult(end.outcome, exchange.batches, exchange.bytes, end.why)
                return ReplayResult(ReplayOutcome.COMPLETE, exchange.batches, exchange.bytes)
        finally:
            self._in_flight.discard(engine)


class _Exchange:
    """One replay: asks, takes the answer apart, and asks again where the answer has a hole."""

    def __init__(self, options: ReplayOptions, first_sequence: int, on_batch: OnBatch) -> None:
        self.batches = 0
        self.bytes = 0
        self._options = options
        self._on_batch = on_batch
        self._next = first_sequence  # the lowest sequence not handed on
        self._answered = False

    async def run(self, context: Context, endpoint: str) -> None:
        """Returns when complete; raises `_Ended` otherwise."""
        socket = new_socket(context, zmq.DEALER, message_bytes_max=self._options.message_bytes_max)
        try:
            socket.set(zmq.RCVHWM, self._options.batches_max + 1)
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                raise _Ended(ReplayOutcome.REFUSED, f"{endpoint!r} cannot be dialled: {error}") from error
            async with contextlib.aclosing(self._messages(socket)) as messages:
                await self._converse(socket, messages)
        finally:
            socket.close()

    async def _converse(self, socket: Socket, messages: AsyncGenerator[list[bytes], None]) -> None:
        self._ask(socket)
        asked_from, hole = self._next, False
        async for frames in messages:
            sequence, payload = _parse(frames)
            if sequence is not None:
                hole = self._take(sequence, payload, hole)
            elif not hole:
                return
            elif self._next == asked_from:
                raise _Ended(ReplayOutcome.TRUNCATED, f"the engine has no batch {self._next}, but later ones")
            else:
                self._ask(socket)
                asked_from, hole = self._next, False

    def _ask(self, socket: Socket) -> None:
        socket.send_multipart([b"", self._next.to_bytes(8, "big")], zmq.DONTWAIT)

    def _take(self, sequence: int, payload: bytes, hole: bool) -> bool:
        """Hand on one batch if it is the next; True from the first hole of an answer on."""
        if sequence < self._next:
            return hole
        if self.batches and sequence > self._next:
            return True
        if self.batches >= self._options.batches_max:
            raise _Ended(ReplayOutcome.TRUNCATED, f"more than {self._options.batches_max} batches")
        if self.bytes + len(payload) > self._options.bytes_max:
            raise _Ended(ReplayOutcome.TRUNCATED, f"more than {self._options.bytes_max} bytes")
        self.batches += 1
        self.bytes += len(payload)
        self._next = sequence + 1
        self._on_batch(sequence, payload)
        return hole

    async def _messages(self, socket: Socket) -> AsyncGenerator[list[bytes], None]:
        """What comes in until the time is up, with a pause for the event loop after every turn."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        now = perf_counter()
        ends_at = now + self._options.deadline_s
        answer_by = min(ends_at, now + self._options.answer_s)
        descriptor = int(socket.get(zmq.FD))
        loop.add_reader(descriptor, readable.set)  # edge-triggered: see zmq_source
        try:
            turn_ends_at = now + self._options.turn_s
            while True:
                readable.clear()
                try:
                    frames = socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    await self._wait(readable, ends_at if self._answered else answer_by)
                    turn_ends_at = perf_counter() + self._options.turn_s
                    continue
                self._answered = True
                yield frames
                if (now := perf_counter()) >= turn_ends_at:
                    if now >= ends_at:
                        raise _Ended(ReplayOutcome.TRUNCATED, f"no end after {self._options.deadline_s} s")
                    await asyncio.sleep(0)
                    turn_ends_at = perf_counter() + self._options.turn_s
        finally:
            loop.remove_reader(descriptor)

    async def _wait(self, readable: asyncio.Event, until: float) -> None:
        try:
            async with asyncio.timeout(until - perf_counter()):
                await readable.wait()
        except TimeoutError:
            if self._answered:
                raise _Ended(ReplayOutcome.TRUNCATED, f"no end after {self._options.deadline_s} s") from None
            raise _Ended(ReplayOutcome.REFUSED, f"no answer within {self._options.answer_s} s") from None


def _parse(frames: list[bytes]) -> tuple[int | None, bytes]:
    """Sequence (None: the end) and payload of one answer, with or without a topic."""
    if not (3 <= len(frames) <= 4 and frames[0] == b"" and len(frames[-2]) == 8):
        shape = [len(frame) for frame in frames[:8]]
        raise _Ended(ReplayOutcome.MALFORMED, f"an answer with frames of {shape} bytes is no replayed batch")
    if frames[-2] == END_SEQUENCE:
        return None, b""
    return int.from_bytes(frames[-2], "big"), frames[-1]
