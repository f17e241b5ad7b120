"""One request is one trace: wrappers around what a request passes through, put there by app.py where traces are on.

    POST /v1/chat/completions            server, HTTP
      receive, queue                     the body, and the gate before the choice
      tokenise, match, choose            the decision; below `match` one gRPC client span per indexer asked
      chat <model>                       client, GenAI: how the request fared
        POST                             client, HTTP: one per engine tried; its context goes to the engine

Attributes are OpenTelemetry's (HTTP, RPC, GenAI), and those of a decision under `kvatlas.`, from the same objects that
headers and log are written from. What a prompt says is in none of them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import Span, SpanKind, Tracer, get_current_span

from kvatlas_common.fleet import EngineView, Load
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.observations import Outcome
from kvatlas_common.tracing import CARRIED, Attributes, carried, context_of, failed, known, span, unsampled
from kvatlas_common.words import EngineId
from kvatlas_router.adapters.asgi import Headers, Message, Receive, Request, Scope, Send
from kvatlas_router.adapters.decide import Asked, Chooses, Decider, Index, Tokens
from kvatlas_router.adapters.http import Forwards, Gates, route_of
from kvatlas_router.adapters.job import Forwarded, Job, Listener
from kvatlas_router.core.admission import Place
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.body import Body
from kvatlas_router.core.choice import BY_COST, Choice, Term
from kvatlas_router.core.policies import Policy
from kvatlas_router.core.prompt import Keys, Prompt

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
UNTRACED = frozenset({"/healthz", "/readyz"})  # somebody asks every second, and learns nothing from a trace
NAME_CHARS_MAX = 128  # of what a client may call a model or a path
MATCH = "kvatlas.v1.KvIndex/Match"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by path."""


class TracedApi:
    """The server span, which continues the client's trace; and the time its body took to arrive."""

    def __init__(self, app: Asgi, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            return await self._app(scope, receive, send)
        method, route = scope["method"][:32], route_of(scope["path"])
        attributes: Attributes = {
            "http.request.method": method,
            "url.path": route or scope["path"][:NAME_CHARS_MAX],
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        } | ({"http.route": route} if route else {})
        parent = context_of(scope["headers"])
        with span(
            self._tracer, f"{method} {route}" if route else method, attributes, kind=SpanKind.SERVER, parent=parent
        ) as server:
            if unsampled(server):
                await self._app(scope, receive, send)
            else:
                await self._app(scope, _Receiving(receive, self._tracer), _answering(send, server))


class _Receiving:
    """`receive`, with a span until the body is there."""

    def __init__(self, receive: Receive, tracer: Tracer) -> None:
        self._receive = receive
        self._tracer = tracer
        self._span: Span | None = None
        self._bytes = 0
        self._over = False

    async def __call__(self) -> Message:
        if self._over:
            return await self._receive()
        self._span = self._span or self._tracer.start_span("receive")
        try:
            message = await self._receive()
        except BaseException:
            self._end()
            raise
        self._bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._end()
        return message

    def _end(self) -> None:
        self._over = True
        if self._span is not None:
            self._span.set_attribute("http.request.body.size", self._bytes)
            self._span.end()


def _answering(send: Send, server: Span) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            server.set_attribute("http.response.status_code", status)
            if status >= 500:
                failed(server, str(status))
        await send(message)

    return answer


@dataclass(frozen=True, slots=True)
class TracedGate:
    gate: Gates
    tracer: Tracer

    async def enter(self, asked: Asked, receive: Receive) -> Place:
        with span(self.tracer, "queue"):
            return await self.gate.enter(asked, receive)

    def release(self, place: Place) -> None:
        self.gate.release(place)


@dataclass(frozen=True, slots=True)
class TracedTokens:
    inner: Tokens
    tracer: Tracer

    async def tokens(self, path: str, body: Body, model: str, engines: Sequence[EngineView]) -> Prompt:
        with span(self.tracer, "tokenise") as stage:
            prompt = await self.inner.tokens(path, body, model, engines)
            stage.set_attributes(known(where=prompt.where, prompt_tokens=prompt.n_tokens, profiles=len(prompt.keys)))
            return prompt


@dataclass(frozen=True, slots=True)
class TracedIndex:
    inner: Index
    tracer: Tracer

    @property
    def available(self) -> bool:
        return self.inner.available

    async def match(self, model: str, prompts: Mapping[str, Keys], *, estimate: bool = False) -> MatchAnswer:
        blocks = max((len(keys) for keys in prompts.values()), default=0)
        with span(self.tracer, "match", known(blocks=blocks, estimate=estimate)) as stage:
            answer = await self.inner.match(model, prompts, estimate=estimate)
            best = max((match.blocks for match in answer.matches), default=0)
            stage.set_attributes(known(engines=len(answer.matches), blocks_found=best))
            return answer

    def loads(self) -> Mapping[EngineId, Load]:
        return self.inner.loads()


@dataclass(frozen=True, slots=True)
class TracedChooser:
    inner: Chooses
    tracer: Tracer

    def choose(
        self,
        policy: Policy,
        ask: Ask,
        views: Sequence[EngineView],
        *,
        loads: Mapping[EngineId, Load],
        answer: MatchAnswer | None,
        now: float,
        cause: str | None = None,
    ) -> Choice | None:
        with span(self.tracer, "choose", known(engines=len(views))) as stage:
            choice = self.inner.choose(policy, ask, views, loads=loads, answer=answer, now=now, cause=cause)
            if choice is not None and stage.is_recording():
                stage.set_attributes(_reason(choice) | _term(choice.terms[0], choice))
            return choice

    def prepare(self, views: Sequence[EngineView], loads: Mapping[EngineId, Load], now: float) -> None:
        self.inner.prepare(views, loads, now)


def traced_decider(decider: Decider, tracer: Tracer) -> Decider:
    return replace(
        decider,
        tokens=TracedTokens(decider.tokens, tracer),
        index=TracedIndex(decider.index, tracer),
        chooser=TracedChooser(decider.chooser, tracer),
    )


@dataclass(frozen=True, slots=True)
class TracedForwarder:
    """Each attempt has a span of its own, whose context replaces the client's in what the engine is sent."""

    inner: Forwards
    tracer: Tracer

    async def forward(self, job: Job, send: Send, told: Forwarded) -> None:
        server = get_current_span()
        if unsampled(server):
            request = replace(job.request, headers=_handed_on(job.request.headers, server))
            return await self.inner.forward(replace(job, request=request), send, told)
        operation = OPERATIONS.get(job.request.path, job.request.route)
        model = job.ask.model[:NAME_CHARS_MAX]
        attributes: Attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model,
            "gen_ai.request.stream": job.ask.streams,
        }
        with span(
            self.tracer, f"{operation} {model}".rstrip(), attributes | _reason(job.choice), kind=SpanKind.CLIENT
        ) as generation:
            attempts = _Attempts(job.listener, replace(job.request), self.tracer, generation)
            outcome = Outcome.CANCELLED  # what is told of one that is, is told later
            try:
                await self.inner.forward(replace(job, request=attempts.request, listener=attempts), send, told)
                outcome = told.outcome
            except Exception:
                outcome = told.outcome
                raise
            finally:
                attempts.over(told.status, outcome)
                generation.set_attributes(_result(told) | known(outcome=outcome))
                server.set_attributes(_reason(job.choice) | known(engine=str(told.term.engine) if told.term else None))
                if outcome is not Outcome.OK:
                    failed(generation, outcome)
                if outcome in (Outcome.CUT, Outcome.CANCELLED):
                    failed(server, outcome)  # its status says 200


@dataclass(slots=True)
class _Attempts:
    """A `Listener` before the one that is told anyway. `request` is what the forwarder sends, and changes with each."""

    inner: Listener
    request: Request
    tracer: Tracer
    generation: Span
    sent_at: float = 0.0
    count: int = 0
    current: Span | None = None

    def sending(self, term: Term) -> None:
        self._end("retried")  # where nobody said why
        host, _, port = term.engine.address.rpartition(":")
        attributes: Attributes = {
            "http.request.method": self.request.method[:32],
            "server.address": host.strip("[]"),
            "server.port": int(port),
            "url.full": term.view.url + self.request.route,
        }
        attributes |= {"http.request.resend_count": self.count} if self.count else {}
        attributes |= known(engine=str(term.engine), predicted_cached_tokens=term.cached_tokens)
        self.count += 1
        self.current = self.tracer.start_span(self.request.method[:32], kind=SpanKind.CLIENT, attributes=attributes)
        self.request.headers = _handed_on(self.request.headers, self.current)
        self.sent_at = time.perf_counter()
        self.inner.sending(term)

    def sent(self, term: Term) -> None:
        self.inner.sent(term)

    def retried(self, why: str) -> None:
        self._end(why)
        self.inner.retried(why)

    def first_byte(self, term: Term) -> None:
        self.generation.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - self.sent_at)
        self.inner.first_byte(term)

    def over(self, status: int, outcome: Outcome) -> None:
        if self.current is None:
            return
        if status:
            self.current.set_attribute("http.response.status_code", status)
        self._end(None if outcome is Outcome.OK else str(status) if status >= 400 else outcome)

    def _end(self, why: str | None) -> None:
        if self.current is not None:
            if why is not None:
                failed(self.current, why)
            self.current.end()
            self.current = None


def _handed_on(headers: Headers, of: Span) -> Headers:
    """The client's headers, but for its trace context: the engine gets that of `of` instead."""
    kept = [(name, value) for name, value in headers if name.decode("latin-1") not in CARRIED]
    return [*kept, *((name.encode(), value.encode()) for name, value in carried(of))]


def _reason(choice: Choice) -> Attributes:
    return known(reason=str(choice.reason), strategy=choice.reason.strategy, cause=choice.reason.cause)


def _term(term: Term, choice: Choice) -> Attributes:
    told = known(
        engine=str(term.engine),
        predicted_cached_tokens=term.cached_tokens,
        to_compute_tokens=term.to_compute,
        queued_tokens=term.ahead.queued_tokens,
        in_flight=term.ahead.pending + term.ahead.decoding,
    )
    if choice.reason.strategy in BY_COST:
        told |= {f"kvatlas.cost.{name}": value for name, value in term.cost._asdict().items()}
    return told


def _result(told: Forwarded) -> Attributes:
    usage, term = told.usage, told.term
    said = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
    usages: Attributes = {name: value for name, value in said.items() if value is not None}
    return usages | known(
        engine=str(term.engine) if term else None,
        predicted_cached_tokens=term.cached_tokens if term else None,
        cached_tokens=usage.cached_tokens,
        attempts=told.attempts,
    )


class TracedMatch(grpc.aio.UnaryUnaryClientInterceptor):
    """A client span for each `Match` that goes to the indexer at `address`, which continues the trace."""

    def __init__(self, tracer: Tracer, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._tracer = tracer
        self._attributes: Attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": MATCH,
            "server.address": host.strip("[]"),
            "server.port": int(port),
        }

    async def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Awaitable[Any]],
        client_call_details: Any,  # a named tuple, which its stubs do not say
        request: Any,
    ) -> Any:
        with span(self._tracer, MATCH, self._attributes, kind=SpanKind.CLIENT) as client:
            metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()), *carried())
            call = await continuation(client_call_details._replace(metadata=metadata), request)
            status = (await call.code()).name
            client.set_attribute("rpc.response.status_code", status)
            if status != "OK":
                failed(client, status)
            return call
