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
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Protocol

import aiohttp
from pydantic import SecretStr
from yarl import URL

from kvatlas_common.fleet import EngineView
from kvatlas_common.observations import Outcome
from kvatlas_router.adapters.asgi import Headers, HttpError, Request, Send
from kvatlas_router.adapters.results import Results, Watch
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.books import Ticket
from kvatlas_router.core.choice import Choice, Term
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.outliers import Fault, fault_of
from kvatlas_router.core.sse import UsageChunkFilter, cut_event, ended
from kvatlas_router.core.usage import NO_USAGE, Tail, Usage, read_usage, response_id

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer trailers"
    b" transfer-encoding upgrade".split()
)
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-request-id"}
_DYING = frozenset({502, 503})
_STALE_S = 1.0  # a pooled connection the engine had closed breaks at once
_IDLE_SLACK = 0.05  # of the idle timeout: setting a timer for every chunk would cost more than passing it on
_POOL_KEEPALIVE_S = 4.0  # vLLM closes idle connections after 5 s (0.32, envs.py: VLLM_HTTP_TIMEOUT_KEEP_ALIVE)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for an engine, and how many engines to try."""

    connect_s: float = 2.0
    first_byte_s: float = 600.0
    idle_s: float = 300.0
    total_s: float = 24 * 3600.0
    attempts: int = 3


class Listener(Protocol):
    """Who is told how a request fares."""

    def sent(self, term: Term) -> None: ...
    def retried(self, why: str) -> None: ...
    def first_byte(self, term: Term) -> None: ...


@dataclass(slots=True)
class Forwarded:
    """What became of a request. `term`: the engine that answered, or was tried last."""

    term: Term | None = None
    status: int = 0
    outcome: Outcome = Outcome.ERROR
    attempts: int = 0
    bytes_out: int = 0
    usage: Usage = NO_USAGE
    response: str | None = None  # id of a stored response
    error: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One request and what forwarding it needs to know. `pinned`: addresses that serve several ranks."""

    request: Request
    body: bytes
    ask: Ask
    choice: Choice
    response_headers: Callable[[Term], Headers]
    listener: Listener
    _: KW_ONLY
    pinned: frozenset[str] = frozenset()
    drop_usage_chunk: bool = False


class _Failed(Exception):
    """One engine could not answer; another may. `blamed`: it is the engine's fault."""

    def __init__(self, why: Fault, text: str, *, blamed: bool = True) -> None:
        super().__init__(text)
        self.why = why
        self.blamed = blamed


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
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Forwarder:
        # No limit here: the number of requests in flight is limited where they come in.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_POOL_KEEPALIVE_S, ttl_dns_cache=10)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect_s),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            max_line_size=65_536,
            max_field_size=65_536,
            read_bufsize=262_144,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def forward(self, job: Job, send: Send, told: Forwarded) -> None:
        """Fills `told` as it goes, so that it holds when cancelled too. Raises `HttpError` when no engine answered."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._patience.total_s
        to_try = deque(job.choice.terms[: self._patience.attempts])
        tried_twice: Term | None = None
        while to_try:
            term = to_try.popleft()
            told.term = term
            told.attempts += 1
            sent_at = time.monotonic()
            entered = self._chooser.send(term, job.ask, sent_at)
            with entered as ticket, self._results.sent(term.engine) as watch:
                try:
                    await self._attempt(job, term, ticket, watch, send, told=told, give_up=give_up, last=not to_try)
                    return
                except _Failed as failure:
                    told.error, why = f"{term.engine}: {failure}", failure.why
                    if why is Fault.RESET and tried_twice is not term and time.monotonic() - sent_at < _STALE_S:
                        tried_twice = term
                        to_try.appendleft(term)
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
        job.listener.sent(term)
        response: aiohttp.ClientResponse | None = None
        try:
            response, first = await self._first_byte(job, term, give_up, last)
            ticket.started(time.monotonic())
            if fault := fault_of(response.status):
                watch.failed(fault, f"answered {response.status}")
            else:
                watch.began()
            job.listener.first_byte(term)
            await _PassOn(job, term, response, told, self._patience.idle_s, give_up).run(first, send)
            if told.outcome is not Outcome.CUT:
                watch.answered()
                if told.outcome is Outcome.OK:
                    ticket.ended(time.monotonic(), told.usage.cached_tokens, told.usage.completion_tokens)
            elif asyncio.get_running_loop().time() < give_up:
                watch.failed(Fault.CUT, told.error)
        finally:
            if response is not None:
                response.close()  # does nothing when the response was read to its end

    async def _first_byte(
        self, job: Job, term: Term, give_up: float, last: bool
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response and the first piece of its body. Raises `_Failed`."""
        patience = self._patience
        until = asyncio.get_running_loop().time() + patience.first_byte_s
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout_at(min(until, give_up)):
                response = await self._open(job, term.view)
                if response.status in _DYING and not last:
                    raise _Failed(Fault.STATUS, f"answered {response.status}")
                return response, await response.content.readany()
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ServerTimeoutError):
                text = f"no first byte within {patience.first_byte_s:g} s"
                raise _Failed(Fault.FIRST_BYTE, text, blamed=until <= give_up) from None
            if isinstance(error, aiohttp.ClientError):
                raise _failure(error, patience.connect_s) from None
            raise

    async def _open(self, job: Job, view: EngineView) -> aiohttp.ClientResponse:
        assert self._session is not None, "not started"
        headers = [
            (k.decode("latin-1"), _text(v)) for k, v in job.request.headers if k not in _unforwarded(job.request)
        ]
        headers.append(("x-request-id", job.request.id))
        if view.id.rank or view.id.address in job.pinned:
            headers = _replaced(headers, "x-data-parallel-rank", str(view.id.rank))
        if key := self._api_key(view):
            headers = _replaced(headers, "authorization", f"Bearer {key.get_secret_value()}")
        url = URL(view.url + job.request.target, encoded=True)
        data = job.body if job.request.method != "GET" else None
        return await self._session.request(job.request.method, url, headers=headers, data=data, allow_redirects=False)


@dataclass(slots=True)
class _PassOn:
    """An answer on its way to the client, from its first byte on."""

    job: Job
    term: Term
    response: aiohttp.ClientResponse
    told: Forwarded
    idle_s: float
    give_up: float
    tail: Tail = field(default_factory=Tail)

    async def run(self, first: bytes, send: Send) -> None:
        told, response = self.told, self.response
        told.status = response.status
        told.outcome = Outcome.OK if response.status < 400 else Outcome.ERROR
        told.error = ""
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        stream = response.content_type == "text/event-stream" and not encoded
        dropper = UsageChunkFilter() if self.job.drop_usage_chunk and stream else None
        await send({"type": "http.response.start", "status": response.status, "headers": self._headers()})
        if self.job.request.path == "/v1/responses" and not encoded:
            told.response = response_id(first)
        try:
            await self._body(first, send, dropper)
        except (aiohttp.ClientError, TimeoutError) as error:
            if not (stream and ended(self.tail.bytes())):
                told.outcome = Outcome.CUT
                told.error = f"{self.term.engine}: lost after {told.bytes_out} bytes: {error!r}"
            if not stream:
                return  # an unfinished body: the server breaks the connection
            if told.outcome is Outcome.CUT:
                await self._end_cut(send, f"engine {self.term.engine} was lost while it answered")
        except asyncio.CancelledError:
            if stream:  # the router goes; where the client is gone this reaches nobody
                await self._end_cut(send, "the router is shutting down")
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            raise
        finally:
            if not encoded:
                told.usage = read_usage(self.tail.bytes())
        if dropper is not None:
            await send({"type": "http.response.body", "body": dropper.rest(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_cut(self, send: Send, why: str) -> None:
        event = cut_event(self.job.request.path, why)
        await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _body(self, first: bytes, send: Send, dropper: UsageChunkFilter | None) -> None:
        clock = asyncio.get_running_loop().time
        chunk, armed = first, clock()
        async with asyncio.timeout_at(min(armed + self.idle_s, self.give_up)) as deadline:
            while chunk:
                self.tail.feed(chunk)
                self.told.bytes_out += len(chunk)
                passed = chunk if dropper is None else dropper.feed(chunk)
                if passed:
                    await send({"type": "http.response.body", "body": passed, "more_body": True})
                now = clock()
                if now - armed > self.idle_s * _IDLE_SLACK:
                    armed = now
                    deadline.reschedule(min(armed + self.idle_s, self.give_up))
                chunk = await self.response.content.readany()

    def _headers(self) -> list[tuple[bytes, bytes]]:
        raw = [(name.lower(), value) for name, value in self.response.raw_headers]
        named = {n.strip().lower() for k, v in raw if k == b"connection" for n in v.split(b",")}
        kept = [(k, v) for k, v in raw if k not in HOP_BY_HOP and k not in named and k != b"x-request-id"]
        return [*kept, *self.job.response_headers(self.term)]


def _failure(error: aiohttp.ClientError, connect_s: float) -> _Failed:
    if isinstance(error, aiohttp.ServerTimeoutError):
        return _Failed(Fault.CONNECT, f"no connection within {connect_s:g} s")
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Failed(Fault.CONNECT, str(error))
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
        return _Failed(Fault.RESET, f"connection lost before the first byte: {error!r}")
    return _Failed(Fault.GARBAGE, f"no HTTP answer: {error!r}"[:200])


def _unforwarded(request: Request) -> frozenset[bytes]:
    connection = request.header.get(b"connection")
    if not connection:
        return _NOT_FORWARDED
    return _NOT_FORWARDED | {n.strip().lower() for n in connection.split(b",")}


def _replaced(headers: list[tuple[str, str]], name: str, value: str) -> list[tuple[str, str]]:
    return [*((k, v) for k, v in headers if k != name), (name, value)]


def _text(value: bytes) -> str:
    """aiohttp writes header values as UTF-8: what is UTF-8 arrives as it was, anything else cannot be kept."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
