"""A pass-through to the engine, which records what passes: bytes in, the same bytes out, streams as they come.

Requests that may change the cache pass one at a time and others wait, so that each can be held to the index; that makes
it a tool to record with, not a router. A client that goes away does not end its request: the engine's answer is read to
the end, so that it can be recorded.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
from aiohttp import web

from kvatlas_cli.record_answers import RECORDED, Answer, Request, read_answer
from kvatlas_cli.record_engine import ANSWER_BYTES_MAX, RANK_HEADER
from kvatlas_cli.record_session import Recorder

BODY_BYTES_MAX = 64 << 20
WAITING_MAX = 256
HARMLESS = frozenset({"/tokenize", "/detokenize"})  # POSTs that never touch the cache
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "host"}
)


class RecordingProxy:
    """`on_recorded` is called after every request that was recorded."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine_url: str,
        recorder: Recorder,
        on_recorded: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._session = session
        self._engine_url = engine_url
        self._recorder = recorder
        self._on_recorded = on_recorded
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._waiting = 0

    async def serve(self, host: str, port: int) -> tuple[web.AppRunner, str]:
        """Listens; answers the runner to clean up, and the URL. Raises `OSError`."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:
            await runner.cleanup()
            raise
        bound_host, bound_port = runner.addresses[0][:2]
        return runner, f"http://{bound_host}:{bound_port}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method != "POST" or request.path in HARMLESS:
            return (await self._pass(request, await request.read()))[0]
        if self._waiting >= WAITING_MAX:
            return _error(503, f"{WAITING_MAX} requests are waiting already: they are recorded one at a time")
        self._waiting += 1
        try:
            return await self._in_turn(request, await request.read())
        finally:
            self._waiting -= 1

    async def _in_turn(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        passed: list[web.StreamResponse] = []

        async def exchange() -> Answer:
            response, answer = await self._pass(request, raw)
            passed.append(response)
            return answer

        recorded = _recorded(request, raw)
        await self._take(recorded, exchange)
        return passed[0]

    async def _take(self, recorded: Request | None, exchange: Callable[[], Awaitable[Answer]]) -> None:
        if recorded is None:
            await self._recorder.alone(exchange)
            return
        await self._recorder.take(recorded, exchange)
        self._on_recorded()

    async def _pass(self, request: web.Request, raw: bytes) -> tuple[web.StreamResponse, Answer]:
        try:
            async with self._session.request(
                request.method,
                self._engine_url + request.raw_path,
                data=raw if request.body_exists else None,
                headers=_end_to_end(request.headers),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
                timeout=self._timeout,
            ) as upstream:
                return await _relay(request, upstream)
        except (aiohttp.ClientError, OSError) as error:
            return _error(502, f"the engine did not answer: {type(error).__name__}"), Answer(status=502)


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse) -> tuple[web.StreamResponse, Answer]:
    """The answer as it comes, and what it says. An engine that breaks off breaks off here too."""
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=_end_to_end(upstream.headers))
    kept = bytearray()
    listening = await _sent(response.prepare(request))
    try:
        async for chunk in upstream.content.iter_any():
            if len(kept) <= ANSWER_BYTES_MAX:
                kept += chunk
            listening = listening and await _sent(response.write(chunk))
    except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
        if request.transport is not None:
            request.transport.abort()
        return response, Answer(status=502)
    if listening:
        await _sent(response.write_eof())
    return response, read_answer(upstream.status, bytes(kept), upstream.content_type == "text/event-stream")


async def _sent(sending: Awaitable[object]) -> bool:
    """False once the client is gone."""
    try:
        await sending
    except ConnectionResetError:
        return False
    return True


def _recorded(request: web.Request, raw: bytes) -> Request | None:
    """None: not a request whose answer tells of the cache."""
    if request.path not in RECORDED:
        return None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    rank = request.headers.get(RANK_HEADER, "")
    return Request(request.path, body, int(rank) if rank.isascii() and rank.isdecimal() else None)


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Without those that are about one connection only."""
    of_connection = {
        part.strip().lower() for n, v in headers.items() if n.lower() == "connection" for part in v.split(",")
    }
    return [(n, v) for n, v in headers.items() if n.lower() not in _HOP_BY_HOP | of_connection]


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": f"kvatlas record: {message}", "type": "recorder"}}, status=status)
