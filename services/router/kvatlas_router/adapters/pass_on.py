"""An answer on its way to the client, from its first byte on: as it comes, byte for byte, and to a proper end.

What an engine sends goes to the client from within the callback that received it, as long as the client's connection
takes it: it is written, or sent and over at once, and the task that waits for the end of the answer is not woken. When
`send` would wait, nothing more is read from the engine, and the task goes on with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from kvatlas_common.observations import Outcome
from kvatlas_router.adapters.asgi import Begun, Headers, Send
from kvatlas_router.adapters.engine_connection import EngineConnection, EngineFailed, Head
from kvatlas_router.adapters.job import Forwarded, Job
from kvatlas_router.core.choice import Term
from kvatlas_router.core.sse import UsageChunkFilter, cut_event, ended
from kvatlas_router.core.usage import Tail, read_usage, response_id

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer trailers"
    b" transfer-encoding upgrade".split()
)
_NOT_RETURNED = HOP_BY_HOP | {b"x-request-id"}
_IDLE_SLACK = 0.05  # of the idle timeout: to look at the clock for every chunk would cost a part of passing it on


@dataclass(slots=True)
class PassOn:
    """`idle_s` without a byte, and `give_up`: when an answer counts as cut."""

    job: Job
    term: Term
    connection: EngineConnection
    head: Head
    told: Forwarded
    send: Send
    idle_s: float
    give_up: float
    tail: Tail = field(default_factory=Tail)
    _dropper: UsageChunkFilter | None = None
    _waiting: Begun[None] | None = None
    _deadline: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    _looking: asyncio.TimerHandle | None = None
    _heard: int = 0  # bytes, when it was last looked whether there are more

    async def run(self, first: bytes, added: Headers, passed: Callable[[], None]) -> None:
        """`added`: headers of the router's own. `passed` is called when what has come of the body has been sent on."""
        told, head = self.told, self.head
        told.status = head.status
        told.outcome = Outcome.OK if head.status < 400 else Outcome.ERROR
        told.error = ""
        encoded = head.get(b"content-encoding") not in (b"", b"identity")
        stream = _media_type(head) == b"text/event-stream" and not encoded
        if self.job.drop_usage_chunk and stream:
            self._dropper = UsageChunkFilter()
        await self.send({"type": "http.response.start", "status": head.status, "headers": [*_kept(head), *added]})
        if self.job.request.path == "/v1/responses" and not encoded:
            told.response = response_id(first)
        try:
            await self._body(passed)
        except (EngineFailed, TimeoutError) as error:
            self.connection.abort()
            if not (stream and ended(self.tail.bytes())):
                told.outcome = Outcome.CUT
                told.error = f"{self.term.engine}: lost after {told.bytes_out} bytes: {error!r}"
            if not stream:
                return  # an unfinished body: the server breaks the connection
            if told.outcome is Outcome.CUT:
                await self._end_cut(f"engine {self.term.engine} was lost while it answered")
        except asyncio.CancelledError:
            self.connection.abort()
            if stream:  # the router goes; where the client is gone this reaches nobody
                await self._end_cut("the router is shutting down")
                await self.send({"type": "http.response.body", "body": b"", "more_body": False})
            raise
        finally:
            if not encoded:
                told.usage = read_usage(self.tail.bytes())
        if self._dropper is not None:
            await self.send({"type": "http.response.body", "body": self._dropper.rest(), "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _body(self, passed: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = asyncio.timeout_at(min(loop.time() + self.idle_s, self.give_up))
        try:
            async with self._deadline:
                self._look()
                self.connection.pour(self._piece)
                passed()
                while not await self.connection.poured():
                    waiting, self._waiting = self._waiting, None
                    if waiting is not None:
                        await waiting
                    self.connection.resume()
        finally:
            if self._looking is not None:
                self._looking.cancel()

    def _look(self) -> None:
        """Puts the end off, now and then, where something has come."""
        loop, heard = asyncio.get_running_loop(), self.told.bytes_out
        if heard != self._heard and not self._deadline.expired():
            self._heard = heard
            self._deadline.reschedule(min(loop.time() + self.idle_s, self.give_up))
        self._looking = loop.call_later(self.idle_s * _IDLE_SLACK, self._look)

    def _piece(self, data: bytes) -> None:
        self.tail.feed(data)
        self.told.bytes_out += len(data)
        passed = data if self._dropper is None else self._dropper.feed(data)
        if passed and not self.job.request.write(passed):
            sending = Begun(self.send({"type": "http.response.body", "body": passed, "more_body": True}))
            if not sending.over:
                self._waiting = sending
                self.connection.hold()

    async def _end_cut(self, why: str) -> None:
        event = cut_event(self.job.request.path, why)
        await self.send({"type": "http.response.body", "body": event, "more_body": True})


def _media_type(head: Head) -> bytes:
    return head.get(b"content-type").partition(b";")[0].strip().lower()


def _kept(head: Head) -> Headers:
    named = {n.strip().lower() for k, v in head.headers if k == b"connection" for n in v.split(b",")}
    return [(k, v) for k, v in head.headers if k not in _NOT_RETURNED and k not in named]
