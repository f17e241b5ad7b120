"""The public port: an OpenAI-compatible API over the whole fleet, as a bare ASGI application.

Bare, because a framework around a proxy costs more than the proxy (docs/adr/0002-bare-asgi-proxy.md). A path is served
only if it is known here: what an engine offers besides (sleep, load an adapter, reset its cache) is not for its users.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from kvatlas_common.fleet import EngineView, Fleet, Health
from kvatlas_common.logs import LimitedLog
from kvatlas_common.observations import Observation, Outcome
from kvatlas_router.adapters.asgi import (
    ClientGone,
    Headers,
    HttpError,
    Receive,
    Request,
    Scope,
    Send,
    read_body,
    reply,
    while_connected,
)
from kvatlas_router.adapters.decide import Asked, Decider, Decision, Lookup, UnknownModel
from kvatlas_router.adapters.exchange import Exchange
from kvatlas_router.adapters.job import Forwarded, Job
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.admission import Place
from kvatlas_router.core.body import Body, InvalidBody
from kvatlas_router.core.choice import NoEngine
from kvatlas_router.core.fail_opens import FailOpens
from kvatlas_router.core.homes import ResponseHomes
from kvatlas_router.core.plans import Labels

log = logging.getLogger(__name__)

ROUTES = {
    "/v1/chat/completions": Lookup.PROMPT,
    "/v1/completions": Lookup.PROMPT,
    "/v1/responses": Lookup.PROMPT,
    "/v1/messages": Lookup.PROMPT,
    "/v1/messages/count_tokens": Lookup.NONE,
    "/v1/embeddings": Lookup.NONE,
    "/v1/score": Lookup.NONE,
    "/v1/rerank": Lookup.NONE,
    "/v2/rerank": Lookup.NONE,
    "/score": Lookup.NONE,
    "/rerank": Lookup.NONE,
    "/pooling": Lookup.NONE,
    "/classify": Lookup.NONE,
    "/tokenize": Lookup.NONE,
    "/detokenize": Lookup.NONE,
}
STREAMED_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
STORED_RESPONSE = "/v1/responses/"
MODELS = "/v1/models"
OVERLOADED_RETRY_S = 1
NO_ENGINE_RETRY_S = 5
REFUSED_LOG_INTERVAL_S = 1.0  # per status and kind: anybody can be refused as fast as they can ask
PATH_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class HttpRules:
    """What the public port takes and refuses. `api_keys`: empty means anybody may ask."""

    body_bytes_max: int = 64 * 1024 * 1024
    body_timeout_s: float = 60.0
    in_flight_max: int = 4096
    api_keys: tuple[str, ...] = ()
    session_header: str = "x-session-id"
    session_cookie: str | None = None
    labels_header: str = "x-kvatlas-labels"
    request_usage: bool = False
    allow_reannouncing: bool = False


class Gates(Protocol):
    async def enter(self, asked: Asked, receive: Receive) -> Place:
        """As `Gate.enter`."""
        ...

    def release(self, place: Place) -> None: ...


class Forwards(Protocol):
    async def forward(self, job: Job, send: Send, told: Forwarded) -> None:
        """As `Forwarder.forward`."""
        ...


class PublicApi:
    """The ASGI application. `draining` makes `/readyz` fail while requests are still served."""

    def __init__(
        self,
        *,
        rules: HttpRules,
        fleet: Callable[[], Fleet],
        decider: Decider,
        gate: Gates,
        forwarder: Forwards,
        homes: ResponseHomes,
        metrics: Metrics,
        fail_opens: FailOpens,
        observe: Callable[[Observation], None],
        new_id: Callable[[], str],
        started_at: float,
    ) -> None:
        self._rules = rules
        self._fleet = fleet
        self._decider = decider
        self._gate = gate
        self._forwarder = forwarder
        self._homes = homes
        self._metrics = metrics
        self._fail_opens = fail_opens
        self._observe = observe
        self._new_id = new_id
        self._started_at = int(started_at)
        self._log = LimitedLog(log, REFUSED_LOG_INTERVAL_S, time.monotonic)
        self._keys = [k.encode() for k in rules.api_keys]
        self.in_flight = 0
        self.draining = False
        metrics.in_flight.set_function(lambda: self.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"no {scope['type']} here")
        request = Request.of(scope, self._new_id)
        try:
            await self._serve(request, receive, send)
        except ClientGone:
            log.info("client gone before its request was sent", extra={"request_id": request.id, "path": request.path})
        except HttpError as error:
            self._metrics.refused.labels(str(error.status)).inc()
            if not request.decided:  # else the line of its exchange tells
                self._refused(request, error)
            await self._reply(request, send, error.status, error.body(), error.headers)
        except asyncio.CancelledError:
            # The server cancels what outlives the drain and ends; nothing waits for this task then.
            log.warning("request cut, the drain is over", extra={"request_id": request.id, "path": request.path})

    def _refused(self, request: Request, error: HttpError) -> None:
        self._log.info(
            f"{error.status} {error.kind}",
            "request refused",
            request_id=request.id,
            path=request.path[:PATH_CHARS_MAX],
            status=error.status,
            why=error.kind,
            total_ms=round((time.perf_counter() - request.arrived) * 1000, 2),
        )

    async def _serve(self, request: Request, receive: Receive, send: Send) -> None:
        path = request.path
        if path == "/healthz":
            await self._reply(request, send, 200, b'{"status": "ok"}')
        elif path == "/readyz":
            status, why = self._readiness()
            await self._reply(request, send, status, json.dumps({"status": why}).encode())
        else:
            self._authorise(request)
            if path == MODELS:
                _require(request, "GET")
                await self._reply(request, send, 200, models_page(self._fleet(), self._started_at))
            elif lookup := self._route(request):
                await self._counted(request, lookup, receive, send)
            else:
                raise HttpError(404, "not_found", f"this router serves no {request.method} {path[:200]}")

    def _route(self, request: Request) -> Lookup | None:
        request.route = route_of(request.path)
        lookup = ROUTES.get(request.path)
        if lookup is not None:
            _require(request, "POST")
            return lookup
        if request.route:
            _require(request, "POST" if request.path.endswith("/cancel") else "GET")
            return Lookup.SESSION
        return None

    async def _counted(self, request: Request, lookup: Lookup, receive: Receive, send: Send) -> None:
        if self.in_flight >= self._rules.in_flight_max:
            why = f"{self.in_flight} requests are in flight, the most this router takes (--in-flight-max)"
            raise HttpError(503, "overloaded", why, _retry_after(OVERLOADED_RETRY_S))
        self.in_flight += 1
        try:
            await self._forward(request, lookup, receive, send)
        finally:
            self.in_flight -= 1

    async def _forward(self, request: Request, lookup: Lookup, receive: Receive, send: Send) -> None:
        request.body = await read_body(request, receive, self._rules.body_bytes_max, self._rules.body_timeout_s)
        body = self._body(request, lookup)
        asked = Asked(request.path, lookup, body, self._session(request), self._labels(request))
        came = time.perf_counter()
        place = await self._gate.enter(asked, receive)
        queued_s = time.perf_counter() - came
        try:
            decision = await self._decide(asked)
        finally:
            self._gate.release(place)  # nothing else runs before the forwarder has entered it in the books
        exchange = Exchange(request, decision, self._metrics, self._observe, queued_s)
        await self._answer(body, exchange, receive, send)

    async def _answer(self, body: Body, exchange: Exchange, receive: Receive, send: Send) -> None:
        job = self._job(exchange.request, body, exchange)
        told = exchange.told
        try:
            async with while_connected(receive):
                await self._forwarder.forward(job, send, told)
        except ClientGone:
            told.outcome = Outcome.CANCELLED
        except HttpError as error:
            told.status = error.status
            raise
        except BaseException:
            told.outcome = Outcome.CUT if told.bytes_out else Outcome.ERROR
            raise
        finally:
            if told.response is not None and told.term is not None:
                self._homes.remember(told.response, told.term.engine)
            exchange.finished()

    def _body(self, request: Request, lookup: Lookup) -> Body:
        """What the body says. Raises `HttpError` for what the router must refuse."""
        if lookup is Lookup.SESSION:
            stored = request.path.removeprefix(STORED_RESPONSE).partition("/")[0]
            return Body(b"", {"previous_response_id": stored})
        try:
            body = Body.parse(request.body)
        except InvalidBody as error:
            raise HttpError(400, "invalid_request_error", str(error)) from None
        if body.asks_reannouncing and not self._rules.allow_reannouncing:
            why = "vllm_xargs.kv_cache_report_mode is refused here: it makes engines announce blocks they do not store"
            raise HttpError(400, "invalid_request_error", why)
        return body

    async def _decide(self, asked: Asked) -> Decision:
        try:
            decision = await self._decider.decide(asked)
        except UnknownModel as error:
            served = ", ".join(error.served[:20])
            why = f"The model `{error.model[:128]}` does not exist. Served here: {served}"
            raise HttpError(404, "not_found_error", why) from None
        except NoEngine as error:
            raise HttpError(503, "no_engine", str(error)[:300], _retry_after(NO_ENGINE_RETRY_S)) from None
        asyncio.get_running_loop().call_soon(self._count, asked, decision)  # while the engine works
        return decision

    def _count(self, asked: Asked, decision: Decision) -> None:
        reason = decision.choice.reason
        self._metrics.chosen(reason.strategy, reason.cause)
        if asked.lookup is Lookup.PROMPT:
            self._fail_opens.decided(reason.cause, time.monotonic())
        for stage, seconds in decision.learnt.stages.items():
            self._metrics.stages.labels(stage).observe(seconds)

    def _session(self, request: Request) -> str | None:
        rules = self._rules
        if named := request.header.get(rules.session_header.encode()):
            return named.decode("latin-1")
        if rules.session_cookie is None or not (cookies := request.header.get(b"cookie")):
            return None
        pairs = (pair.strip().partition("=") for pair in cookies.decode("latin-1").split(";"))
        return next((value for name, _, value in pairs if name == rules.session_cookie), None)

    def _labels(self, request: Request) -> Labels:
        asked = request.header.get(self._rules.labels_header.encode())
        if not asked:
            return ()
        pairs = [label.strip().partition("=") for label in asked.decode("latin-1").split(",")]
        if not all(name and value for name, _, value in pairs):
            raise HttpError(400, "invalid_request_error", f"{self._rules.labels_header}: write name=value,name=value")
        return tuple((name, value) for name, _, value in pairs)

    def _job(self, request: Request, body: Body, exchange: Exchange) -> Job:
        decision = exchange.decision
        job = Job(
            request, request.body, decision.ask, decision.choice, exchange.headers, exchange, pinned=decision.pinned
        )
        wanted = self._rules.request_usage and request.path in STREAMED_USAGE
        if wanted and body.streams and not body.asks_usage:
            return _asking_usage(job, body)
        return job

    def _authorise(self, request: Request) -> None:
        if not self._keys:
            return
        given = request.header.get(b"authorization", b"")
        token = given[7:] if given[:7].lower() == b"bearer " else request.header.get(b"x-api-key", b"")
        if not any(hmac.compare_digest(token, key) for key in self._keys):
            raise HttpError(401, "authentication_error", "no valid API key", ((b"www-authenticate", b"Bearer"),))

    def _readiness(self) -> tuple[int, str]:
        if self.draining:
            return 503, "draining"
        if not any(v.health is not Health.DOWN for v in self._fleet().engines.values()):
            return 503, "no engine is up"
        return 200, "ok"

    async def _reply(self, request: Request, send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
        await reply(send, status, body, (*headers, (b"x-request-id", request.id.encode())))


def route_of(path: str) -> str:
    """The path without ids, for figures and spans: one of few. Empty for a path that is not served."""
    if path.startswith(STORED_RESPONSE):
        return STORED_RESPONSE + "{id}"
    return path if path in ROUTES or path == MODELS else ""


def models_page(fleet: Fleet, created: int) -> bytes:
    """`/v1/models` of the whole fleet, in the shape of vLLM's (0.32, models/protocol.py, ModelCard)."""
    by_name: dict[str, EngineView] = {}
    for view in fleet.engines.values():
        for name in view.models:
            by_name.setdefault(name, view)
    cards = [_card(name, view, created) for name, view in sorted(by_name.items())]
    return json.dumps({"object": "list", "data": cards}).encode()


def _card(name: str, view: EngineView, created: int) -> dict[str, object]:
    adapter = view.adapter(name)
    base = min(view.models - {a.name for a in view.adapters}, default=None)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": adapter.path if adapter else view.root,
        "parent": base if adapter else None,
        "max_model_len": None if adapter else view.max_model_len,
    }


def _asking_usage(job: Job, body: Body) -> Job:
    """The one exception to passing bodies on unchanged; a compressed stream could not be filtered."""
    try:
        asking = body.asking_usage()
    except InvalidBody:
        return job
    headers = tuple((k, v) for k, v in job.request.headers if k != b"accept-encoding")
    request = replace(job.request, headers=headers)
    return replace(job, body=asking, request=request, drop_usage_chunk=True)


def _require(request: Request, *methods: str) -> None:
    if request.method not in methods:
        allow = ", ".join(methods)
        why = f"{request.path[:200]} takes {allow}, not {request.method[:32]}"
        raise HttpError(405, "method_not_allowed", why, ((b"allow", allow.encode()),))


def _retry_after(seconds: int) -> Headers:
    return ((b"retry-after", str(seconds).encode()),)
