"""The little of ASGI the proxy needs: a request, its body within limits, and replies in OpenAI's error shape."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvatlas_common.http11 import BODY_PIECES, Write

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]


def _cannot(piece: bytes) -> bool:
    """A server without that extension."""
    return False


Result = TypeVar("Result")


class Begun(Generator[Any, Any, Result]):
    """Something awaitable, begun on the spot: without a task, a timer, or a turn of the event loop. If that was all
    (`over`), there is a `result`; if it waits for something, whoever awaits this goes on with it.
    """

    __slots__ = ("_steps", "_waits_for", "over", "result")

    def __init__(self, what: Awaitable[Result]) -> None:
        self._steps = what.__await__()
        try:
            self._waits_for = [next(self._steps)]
            self.over = False
        except StopIteration as end:
            self.result: Result = end.value
            self.over = True

    def __await__(self) -> Generator[Any, Any, Result]:
        return self

    def send(self, value: Any) -> Any:
        return self._waits_for.pop() if self._waits_for else self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        return self._steps.throw(*error)


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


@dataclass(slots=True)
class HttpError(Exception):
    """An answer of the router's own, in OpenAI's shape (the same as vLLM's ErrorResponse)."""

    status: int
    kind: str
    message: str
    headers: Headers = ()

    def body(self) -> bytes:
        fields = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        return json.dumps({"error": fields}).encode()


@dataclass(slots=True)
class Request:
    """`headers`: names in lower case. `target`: path and query as they came, percent-encoded."""

    method: str
    path: str
    target: str
    headers: Headers
    id: str
    body: bytes = b""
    header: Mapping[bytes, bytes] = field(default_factory=dict)
    route: str = ""  # the path without ids, for figures
    decided: bool = False  # an engine was chosen for it
    arrived: float = field(default_factory=time.perf_counter)  # its headers did
    write: Write = _cannot  # a piece of the answer, at once

    @classmethod
    def of(cls, scope: Scope, new_id: Callable[[], str]) -> Request:
        headers: Headers = scope["headers"]
        by_name = dict(headers)
        raw_path = scope.get("raw_path") or scope["path"].encode()
        query = scope.get("query_string", b"")
        target = (raw_path + b"?" + query if query else raw_path).decode("latin-1")
        given = by_name.get(b"x-request-id", b"").decode("latin-1")
        usable = 0 < len(given) <= 256 and given.isascii() and given.isprintable()
        request = cls(scope["method"], scope["path"], target, headers, given if usable else new_id(), b"", by_name)
        request.write = scope.get("extensions", {}).pop(BODY_PIECES, _cannot)  # or scope and connection kept each other
        return request


async def read_body(request: Request, receive: Receive, limit: int, timeout_s: float) -> bytes:
    """The whole body. Raises `HttpError` (413, 408) and `ClientGone`."""
    declared = request.header.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    first = Begun(receive())
    if first.over and not first.result.get("more_body", False):
        return _piece(first.result, 0, limit)  # most are there by the time they are asked for: no timer then
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            message = first.result if first.over else await first
            while True:
                chunks.append(_piece(message, size, limit))
                size += len(chunks[-1])
                if not message.get("more_body", False):
                    return b"".join(chunks)
                message = await receive()
    except TimeoutError:
        why = f"the body did not arrive within {timeout_s:g} s"
        raise HttpError(408, "request_timeout", why, ((b"connection", b"close"),)) from None


def _piece(message: Message, before: int, limit: int) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if before + len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> HttpError:
    why = f"the body is larger than the router's limit of {limit} bytes (--body-bytes-max)"
    return HttpError(413, "request_too_large", why, ((b"connection", b"close"),))


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client goes away, and raises `ClientGone` in its place."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


async def reply(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
