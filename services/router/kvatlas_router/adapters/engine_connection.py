"""One HTTP/1.1 connection to an engine: a request goes out, its answer comes in and is handed on as it comes.

This is the path of every token, so it is ours: a parser in C (llhttp, by httptools) whose pieces go to a sink from
within the callback that received them, without a turn of the event loop between (docs/adr/0002-bare-asgi-proxy.md).
What is read at once is handed on at once; nothing waits for more, and nothing is changed: header values stay the bytes
they were.

| while | bytes come | the stream ends |
|---|---|---|
| nobody asks | closed: they belong to nothing | closed |
| the head is awaited | parsed; 1xx skipped; no HTTP, or too long: `GARBAGE` | `RESET` |
| the body comes, its end is known (length, chunks) | handed on | `RESET` |
| the body comes, it ends with the connection | handed on | the body is over |
| the answer is over | the connection is not used again | closed |

A sink that can take no more calls `hold`: nothing is read then until `resume`. Before there is a sink as much as
`HELD_BYTES_MAX` is kept. Trailers are dropped, as every proxy may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

from kvatlas_router.core.outliers import Fault

HELD_BYTES_MAX = 256 * 1024
HEAD_BYTES_MAX = 64 * 1024
"""Of anything that is no body: heads, chunk sizes and extensions, trailers. What is read at once (256 KiB with uvloop)
may come on top."""

Sink = Callable[[bytes], None]
_BODILESS = frozenset({204, 304})


class EngineFailed(Exception):
    """No answer, or only a part of one."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Head:
    """Of an answer. `headers`: names in lower case, values and order as they came."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def get(self, name: bytes) -> bytes:
        """The first of that name, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")


class EngineConnection(asyncio.Protocol):
    """Answers one request at a time, for one task. `on_lost` is called once, when it is gone."""

    def __init__(self, on_lost: Callable[[EngineConnection], None]) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser | None = None  # None: nobody asks
        self._waiter: asyncio.Future[None] | None = None
        self._reset(head_only=False)

    def _reset(self, *, head_only: bool) -> None:
        self._head_only = head_only
        self._head: Head | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._unframed = 0  # received since the last piece of a body
        self._until_close = True  # neither a length nor chunks say where the body ends
        self._keeps = False
        self._over = False
        self._failure: Exception | None = None
        self._sink: Sink | None = None
        self._on_hold = False

    # -- for who asks --------------------------------------------------------------------------------------------------

    def ask(self, head: bytes, body: bytes, *, head_only: bool = False) -> None:
        """Sends a request. `head_only`: of the answer too, whatever length it tells (HEAD)."""
        self._reset(head_only=head_only)
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True)
        if self._transport.is_closing():
            self._fail(Fault.RESET, "closed before it was asked")
        elif body:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head)

    async def head(self) -> Head:
        """Raises `EngineFailed`."""
        while self._head is None:
            await self._changed()
        return self._head

    async def begun(self) -> bytes:
        """What has come of the body, once anything has; empty if there is none. It stays here. Raises `EngineFailed`,
        also where a part has come: of what nobody was sent, a whole answer can still be had elsewhere.
        """
        while self._failure is not None or not (self._pieces or self._over):
            await self._changed()
        return b"".join(self._pieces)

    def pour(self, sink: Sink) -> None:
        """What has come of the body, and what comes from now on, goes to `sink`; what `sink` raises, `poured` does."""
        self._sink = sink
        self._hand_on()
        if not self._on_hold:
            self._transport.resume_reading()

    async def poured(self) -> bool:
        """Waits until the sink has had all of the body, or, then False, has called `hold`. Raises `EngineFailed`."""
        while not self._on_hold:
            if self._over:
                return True
            await self._changed()
        return False

    def hold(self) -> None:
        self._on_hold = True
        self._transport.pause_reading()
        self._wake()

    def resume(self) -> None:
        self._on_hold = False
        self._hand_on()
        if not self._on_hold:
            self._transport.resume_reading()

    @property
    def reusable(self) -> bool:
        """Whether another request may follow the one answered; one that was not read to its end is in the way."""
        sent = not self._transport.is_closing() and self._transport.get_write_buffer_size() == 0
        return self._over and self._keeps and sent

    def rest(self) -> None:
        """Nobody asks until the next `ask`."""
        self._parser = self._sink = self._head = None

    def abort(self) -> None:
        """At once: an engine that computes for nobody should know."""
        self._keeps = False
        self._sink = None
        self._transport.abort()

    async def _changed(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._failure is not None and not self._on_hold:
            raise self._failure

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, fault: Fault, text: str) -> None:
        if not self._over and self._failure is None:
            self._failure = EngineFailed(fault, text)
        self._keeps = False
        self._transport.abort()
        self._wake()

    def _hand_on(self) -> None:
        if self._on_hold or not self._pieces:
            return
        if self._sink is None:
            if self._held_bytes > HELD_BYTES_MAX:
                self._transport.pause_reading()
            self._wake()
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._held_bytes = 0
        try:
            self._sink(data)
        except Exception as defect:  # in a callback of the event loop nobody would hear of it
            self._sink, self._failure = None, defect
            self._wake()

    # -- for the event loop --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # that of uvloop is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._transport.abort()
            return
        self._unframed += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._hand_on()
            self._fail(Fault.GARBAGE, f"no HTTP answer: {str(error)[:200]}")
            return
        self._hand_on()
        if self._unframed > HEAD_BYTES_MAX:
            self._fail(Fault.GARBAGE, f"no HTTP answer: more than {HEAD_BYTES_MAX} bytes that are no body")

    def eof_received(self) -> None:
        if self._parser is None or self._over:
            return
        if self._head is not None and self._until_close:
            self._end()
        else:
            self._fail(Fault.RESET, f"closed {'within' if self._head else 'before'} its answer")

    def connection_lost(self, error: Exception | None) -> None:
        if self._parser is not None and not self._over:
            self._fail(Fault.RESET, f"lost {'within' if self._head else 'before'} its answer: {error or 'closed'}")
        self._keeps = False
        self._parser = None
        self._on_lost(self)

    # -- for the parser ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._over:
            self._keeps = False  # an answer to what nobody asked

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is None:
            self._headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if self._over or parser is None:
            return
        status = parser.get_status_code()
        if status == 101 or status < 100:
            raise httptools.HttpParserError(f"status {status}")
        if status < 200:
            return
        self._head = head = Head(status, self._headers)
        self._until_close = not (_chunked(head) or head.get(b"content-length") or status in _BODILESS)
        self._keeps = parser.should_keep_alive()
        if self._head_only:
            self._keeps = False  # the parser waits for a body that does not come
            self._end()
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        if not self._over:
            self._pieces.append(body)
            self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._head is None:
            self._headers = []  # 1xx, another one follows
        else:
            self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._wake()


def _chunked(head: Head) -> bool:
    """As llhttp sees it: whatever else was done to it, an answer is in chunks if that was done last."""
    codings = b",".join(value for name, value in head.headers if name == b"transfer-encoding")
    return codings.lower().rpartition(b",")[2].strip() == b"chunked"
