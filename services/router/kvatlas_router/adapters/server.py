"""An ASGI application on a socket of its own, started and drained by whoever composes the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from kvatlas_common.http11 import FastHttp11

CLIENT_KEEPALIVE_S = 75  # longer than load balancers in front usually keep idle connections (60 s)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the process, and several servers share it."""
        yield


class HttpServer:
    """`start` binds; `stop` takes no more requests and waits for those in flight, at most `drain_s`."""

    def __init__(self, app: Any, host: str, port: int, drain_s: float) -> None:
        self._address = (host, port)
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http=FastHttp11,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=CLIENT_KEEPALIVE_S,
                timeout_graceful_shutdown=max(int(drain_s), 1),
                h11_max_incomplete_event_size=65_536,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self.port = port

    async def start(self) -> None:
        """Raises `OSError` when the address cannot be bound."""
        host = self._address[0]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(self._address, family=family, backlog=2048)
        self.port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._serving = None

    def hurry(self) -> None:
        """Do not wait for requests in flight any longer."""
        self._server.force_exit = True
