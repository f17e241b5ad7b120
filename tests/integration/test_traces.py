"""One request is one trace, over router, indexer and engine; and whoever takes the spans disturbs nobody."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode

from kvatlas_common import tracing
from kvatlas_common.fleet import Sync
from kvatlas_common.tracing import Tracing, open_tracing
from kvatlas_indexer.app import Indexer
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig
from kvatlas_loadtest.valkey import Valkey
from tests.integration.engine_kit import simulated_engine
from tests.integration.redis_kit import fresh_prefix
from tests.integration.router_kit import (
    CHAT,
    EVENT_STREAM,
    NO_INDEXER,
    Running,
    ScriptedEngine,
    Seen,
    answer,
    chunk,
    hang_up,
    replying,
    routed,
    running,
)

TRACE, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the treasure lies under the old lighthouse"
FREE = ("--zmq-listen", "tcp://127.0.0.1:*", "--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0")


class Spans(SpanExporter):
    """Every span that ended, of all services whose traces it was given."""

    def __init__(self) -> None:
        self.all: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.all += spans
        return SpanExportResult.SUCCESS

    @property
    def tracing(self) -> Tracing:
        """Of one more service."""
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self))
        return Tracing(provider)

    def one(self, name: str, kind: SpanKind = SpanKind.INTERNAL) -> ReadableSpan:
        (found,) = self.named(name, kind)
        return found

    def named(self, name: str, kind: SpanKind) -> list[ReadableSpan]:
        return [s for s in self.all if s.name == name and s.kind is kind]


@asynccontextmanager
async def system(spans: Spans, *, store: Sequence[str] = ()) -> AsyncIterator[Running]:
    async with AsyncExitStack() as stack:
        engine = simulated_engine(EngineConfig(), tracer=spans.tracing.tracer)
        await stack.enter_async_context(engine)
        argv = ["--engine", f"{engine.address},events={engine.events_endpoint},replay={engine.replay_endpoint}"]
        indexer = Indexer(IndexerSettings.load([*argv, *FREE, *store], {}), environ={}, tracing=spans.tracing)
        await indexer.start()
        stack.push_async_callback(indexer.stop)
        target = ("--indexer", indexer.grpc_address, "--lookup-deadline-ms", "2000")
        yield await stack.enter_async_context(running(*target, ready=1, tracing=spans.tracing))


def _told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def _tree(spans: Sequence[ReadableSpan]) -> dict[str, str]:
    """Each span's name, and whose child it is. The two ends of a call have one name, so their kind is added."""
    calls = "kvatlas.v1.KvIndex/Match"
    names = {s.context.span_id: f"{s.kind.name.lower()} {s.name}" if s.name == calls else s.name for s in spans}
    parents = {names[s.context.span_id]: s.parent.span_id if s.parent else 0 for s in spans}
    return {name: names.get(parent, f"{parent:016x}") for name, parent in parents.items()}


async def test_a_request_is_one_trace_that_continues_the_clients() -> None:
    spans = Spans()
    async with system(spans) as run:
        body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET * 20}], "max_tokens": 4}
        await run.post(body=body)
        await run.until(lambda f: all(v.sync is Sync.EXACT and v.profile for v in f.engines.values()))
        spans.all.clear()
        came = {"traceparent": f"00-{TRACE}-{CLIENTS_SPAN}-01", "tracestate": "vendor=1"}
        status, headers, page = await run.post(body=body, headers=came)
        usage = json.loads(page)["usage"]
    assert status == 200
    spans.all[:] = [span for span in spans.all if f"{span.context.trace_id:032x}" == TRACE]  # engines are probed, too
    assert _tree(spans.all) == {
        "POST /v1/chat/completions": CLIENTS_SPAN,
        "receive": "POST /v1/chat/completions",
        "queue": "POST /v1/chat/completions",
        "tokenise": "POST /v1/chat/completions",
        "match": "POST /v1/chat/completions",
        "client kvatlas.v1.KvIndex/Match": "match",
        "server kvatlas.v1.KvIndex/Match": "client kvatlas.v1.KvIndex/Match",
        "lookup": "server kvatlas.v1.KvIndex/Match",
        "choose": "POST /v1/chat/completions",
        "chat tiny": "POST /v1/chat/completions",
        "POST": "chat tiny",
        "llm_request": "POST",
    }
    told = _told(spans.one("chat tiny", SpanKind.CLIENT))
    assert told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert told["kvatlas.engine"] == headers["x-kvatlas-engine"]
    assert told["kvatlas.reason"] == headers["x-kvatlas-reason"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert told["kvatlas.cached_tokens"] == told["kvatlas.predicted_cached_tokens"] == cached
    assert _told(spans.one("choose"))["kvatlas.cost.compute_ms"] > 0
    assert all("lighthouse" not in span.to_json() for span in spans.all)
    assert all(span.status.status_code is not StatusCode.ERROR for span in spans.all)


async def test_every_attempt_has_a_span_of_its_own() -> None:
    spans = Spans()
    dead, well = ScriptedEngine(hang_up), ScriptedEngine()
    async with routed(dead, well, flags=(*NO_INDEXER, "--policy", "round-robin"), tracing=spans.tracing) as run:
        for _ in range(2):
            status, _, _ = await run.post()
            assert status == 200
    tried = spans.named("POST", SpanKind.CLIENT)
    failed = [s for s in tried if s.status.status_code is StatusCode.ERROR]
    assert {_told(s)["kvatlas.engine"] for s in failed} == {dead.address}
    assert {_told(s)["error.type"] for s in failed} == {"reset"}
    received = [seen.header("traceparent") or "" for seen in (*dead.seen, *well.seen)]
    assert len(set(received)) == len(received) == len(tried)
    assert {header.split("-")[2] for header in received} == {f"{s.context.span_id:016x}" for s in tried}


async def test_errors_show_without_their_text() -> None:
    spans = Spans()
    failing = ScriptedEngine(replying(answer(b'{"error": "no"}', "500 Internal Server Error")))
    async with routed(failing, tracing=spans.tracing) as run:
        await run.post()
        assert (await run.post(body={"model": SECRET, "messages": []}))[0] == 404
    wrong, unknown = spans.named("POST /v1/chat/completions", SpanKind.SERVER)
    assert (_told(wrong)["http.response.status_code"], wrong.status.status_code) == (500, StatusCode.ERROR)
    assert _told(unknown)["http.response.status_code"] == 404
    assert unknown.status.status_code is StatusCode.UNSET
    assert not any(span.events for span in spans.all)
    assert all("lighthouse" not in span.to_json() for span in spans.all)


async def test_without_an_exporter_the_clients_context_passes_unchanged() -> None:
    came = {"traceparent": f"00-{TRACE}-{CLIENTS_SPAN}-01", "tracestate": "vendor=1"}
    async with routed(engine := ScriptedEngine()) as run:
        await run.post(headers=came)
    assert {name: engine.seen[0].header(name) for name in came} == came


async def test_the_handled_line_names_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    spans = Spans()
    async with routed(engine := ScriptedEngine(), tracing=spans.tracing) as run:
        await run.post(headers={"traceparent": f"00-{TRACE}-{CLIENTS_SPAN}-01"})
        await run.post(headers={"traceparent": f"00-{TRACE}-{CLIENTS_SPAN}-00"})
    sampled, unsampled = [r for r in caplog.records if r.getMessage() == "request handled"]
    assert sampled.__dict__["trace_id"] == TRACE
    assert "trace_id" not in unsampled.__dict__
    assert [(seen.header("traceparent") or "")[-2:] for seen in engine.seen] == ["01", "00"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans over OTLP, as any collector does."""

    def __init__(self) -> None:
        self.services: dict[str, list[str]] = {}

    async def Export(self, request: Any, context: object) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            (service,) = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
            spans = [span.name for scope in resource.scope_spans for span in scope.spans]
            self.services.setdefault(service, []).extend(spans)
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_are_exported_by_the_usual_variables_and_flushed_when_the_router_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with routed(ScriptedEngine(), tracing=open_tracing(environ, "kvatlas-router")) as run:
        await run.post()
    assert "POST /v1/chat/completions" in collector.services["kvatlas-router"]
    await server.stop(None)


async def test_an_exporter_that_is_down_disturbs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.5)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with routed(ScriptedEngine(), tracing=open_tracing(environ, "kvatlas-router")) as run:
        for _ in range(20):
            status, _, _ = await run.post()
            assert status == 200
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 8


async def test_a_shared_store_is_in_the_trace(single: Valkey) -> None:
    spans = Spans()
    async with system(spans, store=("--store", single.url, "--store-prefix", fresh_prefix())) as run:
        body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET * 20}], "max_tokens": 4}
        await run.post(body=body)
        await run.until(lambda f: all(v.sync is Sync.EXACT and v.profile for v in f.engines.values()))
        spans.all.clear()
        status, _, _ = await run.post(body=body, headers={"traceparent": f"00-{TRACE}-{CLIENTS_SPAN}-01"})
        assert status == 200
    spans.all[:] = [span for span in spans.all if f"{span.context.trace_id:032x}" == TRACE]
    assert _tree(spans.all)["MGET kvatlas"] == "server kvatlas.v1.KvIndex/Match"
    told = _told(spans.one("MGET kvatlas", SpanKind.CLIENT))
    assert (told["db.system.name"], told["kvatlas.store"]) == ("redis", "redis")


async def test_a_client_that_leaves_ends_its_spans(caplog: pytest.LogCaptureFixture) -> None:
    async def begins(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: {}\n\n"))
        await asyncio.Event().wait()

    spans = Spans()
    async with routed(engine := ScriptedEngine(begins), tracing=spans.tracing) as run:
        async with run.http.post(run.url + "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
            await reply.content.readany()
            reply.close()
        await asyncio.wait_for(engine.gone.wait(), 30)
    generation = spans.one("chat tiny", SpanKind.CLIENT)
    assert _told(generation)["kvatlas.outcome"] == _told(generation)["error.type"] == "cancelled"
    assert (
        len(spans.named("POST", SpanKind.CLIENT)) == len(spans.named("POST /v1/chat/completions", SpanKind.SERVER)) == 1
    )
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry.context")]
