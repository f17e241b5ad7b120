"""Connections to engines, kept between requests: at the same engine the next request finds one open.

A connection that was idle for long is not used: vLLM closes those after 5 s, and a request that meets the closing is
lost. Of several the one used last is taken, so that those too many grow old and are closed. Their number is limited
where requests come in, as each is used by one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from kvatlas_router.adapters.engine_connection import EngineConnection, EngineFailed
from kvatlas_router.core.outliers import Fault

IDLE_MAX_S = 4.0  # vLLM closes idle connections after 5 s (0.32, envs.py: VLLM_HTTP_TIMEOUT_KEEP_ALIVE)
NAMES_KEPT_S = 10.0  # addresses of a name
NAMES_MAX = 1024  # the one looked up first is forgotten
SECOND_ADDRESS_AFTER_S = 0.25  # of a name with several (RFC 8305)
_PORTS = {"http": 80, "https": 443}

Addresses = list[Any]  # as getaddrinfo tells them


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine's URL leads. `name`: host and port as the Host header tells them."""

    host: str
    port: int
    tls: bool
    name: bytes


@lru_cache(4096)
def origin(url: str) -> Origin:
    """`url`: without a path."""
    parts = urlsplit(url)
    port = parts.port or _PORTS[parts.scheme]
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    told = name if port == _PORTS[parts.scheme] else f"{name}:{port}"
    return Origin(host, port, parts.scheme == "https", told.encode())


class EnginePool:
    """`connect_s`: for the name, the connection and TLS together."""

    def __init__(self, connect_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._connect_s = connect_s
        self._clock = clock
        self._idle: dict[Origin, list[tuple[EngineConnection, float]]] = {}  # since when, the newest last
        self._open: dict[EngineConnection, Origin] = {}
        self._names: dict[Origin, tuple[Addresses, float]] = {}
        self._tls: ssl.SSLContext | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def connection(self, to: Origin) -> EngineConnection:
        """An open one, for the caller alone until it calls `release`. Raises `EngineFailed` (`CONNECT`)."""
        idle = self._idle.get(to)
        while idle:
            connection, since = idle.pop()
            if connection.reusable and self._clock() - since < IDLE_MAX_S:
                return connection
            connection.abort()
        try:
            async with asyncio.timeout(self._connect_s):
                return await self._connected(to)
        except TimeoutError:
            why = f"no connection within {self._connect_s:g} s"
        except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: uvloop, for some of the same reasons
            why = f"no connection: {error}"
        self._names.pop(to, None)
        raise EngineFailed(Fault.CONNECT, why)

    def release(self, connection: EngineConnection) -> None:
        """Whoever asked is done with it, and with the answer, whole or not."""
        to = self._open.get(connection)
        if to is None or not connection.reusable:
            connection.abort()
            return
        connection.rest()
        self._idle.setdefault(to, []).append((connection, self._clock()))
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_MAX_S, self._close_old)

    async def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.abort()
        while self._open:
            await asyncio.sleep(0)  # their transports close one turn of the event loop later

    async def _connected(self, to: Origin) -> EngineConnection:
        loop = asyncio.get_running_loop()
        where = await start_connection(
            await self._addresses(to), happy_eyeballs_delay=SECOND_ADDRESS_AFTER_S, interleave=1
        )
        try:
            _, connection = await loop.create_connection(
                lambda: EngineConnection(self._lost),
                sock=where,
                ssl=self._tls_context() if to.tls else None,
                server_hostname=to.host if to.tls else None,
            )
        except BaseException:
            where.close()
            raise
        self._open[connection] = to
        return connection

    async def _addresses(self, to: Origin) -> Addresses:
        known, since = self._names.get(to, ([], 0.0))
        if known and self._clock() - since < NAMES_KEPT_S:
            return known
        found: Addresses = await asyncio.get_running_loop().getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM)
        self._names.pop(to, None)
        while len(self._names) >= NAMES_MAX:
            del self._names[next(iter(self._names))]
        self._names[to] = found, self._clock()
        return found

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _lost(self, connection: EngineConnection) -> None:
        """One that is idle stays in its list until it is found there: it is not reusable."""
        self._open.pop(connection, None)

    def _close_old(self) -> None:
        self._sweep = None
        now = self._clock()
        for to, idle in list(self._idle.items()):
            kept = []
            for connection, since in idle:
                if connection.reusable and now - since < IDLE_MAX_S:
                    kept.append((connection, since))
                else:
                    connection.abort()
            if kept:
                self._idle[to] = kept
            else:
                del self._idle[to]
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_MAX_S / 4, self._close_old)
