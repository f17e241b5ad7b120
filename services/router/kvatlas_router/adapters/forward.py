"""Sending a request to the engine chosen, and its answer back as it comes.

Until the first byte of the body the client has been sent nothing, so the request can be tried on the next engine of the
choice: after a refused or broken connection, a reply that is not HTTP, a 502 or 503, or no first byte in time. Any
other answer passes through as it is. From the first byte on nothing can be taken back: when the engine dies then, an
event stream ends with an error event, any other body with a broken connection, and the response counts as cut.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pydantic import SecretStr

from kvatlas_common.fleet import EngineView
from kvatlas_common.observations import Outcome
from kvatlas_router.adapters.asgi import Headers, HttpError, Request, Send
from kvatlas_router.adapters.engine_connection import EngineConnection, EngineFailed, Head
from kvatlas_router.adapters.engine_pool import EnginePool, Origin, origin
from kvatlas_router.adapters.job import Forwarded, Job
from kvatlas_router.adapters.pass_on import HOP_BY_HOP, PassOn
from kvatlas_router.adapters.results import Results, Watch
from kvatlas_router.core.books import Ticket
from kvatlas_router.core.choice import Term
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.outliers import Fault, fault_of

_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-request-id"}
_DYING = frozenset({502, 503})
_STALE_S = 1.0  # a pooled connection the engine had closed breaks at once


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for an engine, and how many engines to try."""

    connect_s: float = 2.0
    first_byte_s: float = 600.0
    idle_s: float = 300.0
    total_s: float = 24 * 3600.0
    attempts: int = 3


class _Failed(Exception):
    """One engine could not answer; another may. `blamed`: it is the engine's fault."""

    def __init__(self, why: Fault, text: str, *, blamed: bool = True) -> None:
        super().__init__(text)
        self.why = why
        self.blamed = blamed


@dataclass(frozen=True, slots=True)
class _Begun:
    """An answer whose first byte is there, and what the router adds to its head."""

    connection: EngineConnection
    head: Head
    first: bytes
    added: Headers


class Forwarder:
    """One connection pool for all engines. Nothing in it touches a body, and it neither follows nor stores anything."""

    def __init__(
        self,
        patience: Patience,
        chooser: Chooser,
        results: Results,
        api_key: Callable[[EngineView], SecretStr | None],
    ) -> None:
        self._patience = patience
        self._chooser = chooser
        self._results = results
        self._api_key = api_key
        # No limit here: the number of requests in flight is limited where they come in.
        self._pool = EnginePool(patience.connect_s)

    async def __aenter__(self) -> Forwarder:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        await self._pool.close()

    async def forward(self, job: Job, send: Send, told: Forwarded) -> None:
        """Fills `told` as it goes, so that it holds when cancelled too. Raises `HttpError` when no engine answered."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._patience.total_s
        terms = job.choice.terms  # each is made when it is looked at
        to_try = deque(range(min(len(terms), self._patience.attempts)))
        tried_twice: int | None = None
        while to_try:
            number = to_try.popleft()
            told.term = term = terms[number]
            told.attempts += 1
            sent_at = time.monotonic()
            entered = self._chooser.send(term, job.ask, sent_at)
            with entered as ticket, self._results.sent(term.engine) as watch:
                try:
                    await self._attempt(job, term, ticket, watch, send, told=told, give_up=give_up, last=not to_try)
                    return
                except _Failed as failure:
                    told.error, why = f"{term.engine}: {failure}", failure.why
                    if why is Fault.RESET and tried_twice != number and time.monotonic() - sent_at < _STALE_S:
                        tried_twice = number
                        to_try.appendleft(number)
                    elif failure.blamed:
                        watch.failed(why, str(failure))
            if to_try:
                job.listener.retried(why)
            elif why is Fault.FIRST_BYTE:
                raise HttpError(504, "engine_timeout", told.error)
        raise HttpError(502, "engine_unreachable", told.error)

    async def _attempt(
        self,
        job: Job,
        term: Term,
        ticket: Ticket,
        watch: Watch,
        send: Send,
        *,
        told: Forwarded,
        give_up: float,
        last: bool,
    ) -> None:
        """One engine. Raises `_Failed` only while the client has been sent nothing."""
        begun = await self._first_byte(job, term, give_up, last)
        try:

            def passed() -> None:
                """The first of the body; what is made of that can wait until then."""
                ticket.started(time.monotonic())
                if fault := fault_of(begun.head.status):
                    watch.failed(fault, f"answered {begun.head.status}")
                else:
                    watch.began()
                job.listener.first_byte(term)

            passing = PassOn(job, term, begun.connection, begun.head, told, send, self._patience.idle_s, give_up)
            await passing.run(begun.first, begun.added, passed)
            if told.outcome is not Outcome.CUT:
                watch.answered()
                if told.outcome is Outcome.OK:
                    ticket.ended(time.monotonic(), told.usage.cached_tokens, told.usage.completion_tokens)
            elif asyncio.get_running_loop().time() < give_up:
                watch.failed(Fault.CUT, told.error)
        finally:
            self._pool.release(begun.connection)

    async def _first_byte(self, job: Job, term: Term, give_up: float, last: bool) -> _Begun:
        """Raises `_Failed`."""
        patience = self._patience
        until = asyncio.get_running_loop().time() + patience.first_byte_s
        connection: EngineConnection | None = None
        try:
            async with asyncio.timeout_at(min(until, give_up)):
                job.listener.sending(term)
                to = origin(term.view.url)
                connection = await self._pool.connection(to)
                self._ask(connection, to, job, term.view)
                job.listener.sent(term)
                added = job.response_headers(term)
                head = await connection.head()
                if head.status in _DYING and not last:
                    raise _Failed(Fault.STATUS, f"answered {head.status}")
                return _Begun(connection, head, await connection.begun(), added)
        except BaseException as error:
            if connection is not None:
                connection.abort()
                self._pool.release(connection)
            if isinstance(error, TimeoutError):
                text = f"no first byte within {patience.first_byte_s:g} s"
                raise _Failed(Fault.FIRST_BYTE, text, blamed=until <= give_up) from None
            if isinstance(error, EngineFailed):
                raise _Failed(error.fault, str(error)) from None
            raise

    def _ask(self, connection: EngineConnection, to: Origin, job: Job, view: EngineView) -> None:
        request = job.request
        dropped = _unforwarded(request)
        headers = [(name, value) for name, value in request.headers if name not in dropped]
        headers.append((b"x-request-id", request.id.encode("latin-1")))
        if view.id.rank or view.id.address in job.pinned:
            headers = _replaced(headers, b"x-data-parallel-rank", str(view.id.rank))
        if key := self._api_key(view):
            headers = _replaced(headers, b"authorization", f"Bearer {key.get_secret_value()}")
        body = job.body if request.method != "GET" else b""
        if request.method != "GET":
            headers.append((b"content-length", b"%d" % len(body)))
        first = f"{request.method} {request.target} HTTP/1.1\r\nhost: ".encode("latin-1")
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        connection.ask(b"%b%b\r\n%b\r\n" % (first, to.name, lines), body, head_only=request.method == "HEAD")


def _unforwarded(request: Request) -> frozenset[bytes]:
    connection = request.header.get(b"connection")
    if not connection:
        return _NOT_FORWARDED
    return _NOT_FORWARDED | {n.strip().lower() for n in connection.split(b",")}


def _replaced(headers: list[tuple[bytes, bytes]], name: bytes, value: str) -> list[tuple[bytes, bytes]]:
    """`value` is of the operator's making, and not seen by a parser yet."""
    if not value.isprintable():
        raise ValueError(
            f"the value of {name.decode()} would break a line"
        )  # which says nothing of it: it may be a key
    return [*((k, v) for k, v in headers if k != name), (name, value.encode())]
