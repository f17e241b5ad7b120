"""Serving an ASGI app with uvicorn inside somebody else's event loop.

uvicorn by itself takes over the process: it installs signal handlers, configures logging, and exits where it cannot
bind. Here the caller owns the process, so the socket is bound first, and starting and stopping are calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvatlas_common.http11 import Http11
from kvatlas_indexer.adapters.addresses import AddressUnavailable, unavailable

BACKLOG = 512
CONNECTIONS_MAX = 512


class LimitBody:
    """ASGI middleware: a request whose body is longer than `bytes_max` is answered with `answer`, its body unread."""

    def __init__(self, app: ASGIApp, bytes_max: int, answer: ASGIApp) -> None:
        self._app, self._bytes_max, self._answer = app, bytes_max, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._bytes_max:
            return await self._answer(scope, receive, send)
        received, answered = 0, False

        async def counting() -> Message:
            nonlocal received, answered
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._bytes_max:
                answered = True
                await self._answer(scope, receive, send)
                return {"type": "http.disconnect"}
            return message

        async def unless_answered(message: Message) -> None:
            if not answered:
                await send(message)

        await self._app(scope, counting, unless_answered)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the caller's


class HttpServer:
    """A running server."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], port: int) -> None:
        self.port = port
        self._server = server
        self._task = task

    async def stop(self) -> None:
        """No new connections; requests under way are answered within the grace given at the start."""
        self._server.should_exit = True
        await self._task


async def serve(app: ASGIApp, host: str, port: int, *, grace_s: int = 5) -> HttpServer:
    """Serve until stopped; port 0 takes a free one. Raises `AddressUnavailable`."""
    listener = _bind(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=Http11,
        ws="none",
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=grace_s,
    )
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name=f"http {host}:{port}")
    while not server.started and not task.done():
        await asyncio.sleep(0.001)
    if task.done():
        task.result()
    return HttpServer(server, task, listener.getsockname()[1])


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise AddressUnavailable("HTTP", f"{host}:{port}", str(error.strerror), "Check --rest-listen.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise unavailable("HTTP", f"{host}:{port}", error.errno or 0, "--rest-listen") from error
    return listener
