from __future__ import annotations

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from kvatlas_common.tracing import TraceIds, _exporter_name, carried, context_of, known, open_tracing, span

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("environ", "exporter"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}, "otlp_proto_grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, "otlp_proto_grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp_proto_grpc"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp_proto_http"),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            },
            "otlp_proto_grpc",
        ),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
    ],
)
def test_what_turns_traces_on(environ: dict[str, str], exporter: str | None) -> None:
    assert _exporter_name(environ) == exporter


def test_an_exporter_that_is_not_there_means_no_traces(caplog: pytest.LogCaptureFixture) -> None:
    assert open_tracing({"OTEL_TRACES_EXPORTER": "smoke-signals"}, "kvatlas-router") is None
    (line,) = caplog.records
    assert line.__dict__["why"] == "no exporter of this name is installed"


def test_a_context_is_taken_up_and_handed_on() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    headers = [(b"traceparent", TRACEPARENT.encode()), (b"tracestate", b"vendor=1"), (b"accept", b"*/*")]
    with span(tracer, "served", kind=SpanKind.SERVER, parent=context_of(headers)) as served:
        handed_on = dict(carried())
    context = served.get_span_context()
    assert handed_on == {
        "traceparent": f"00-{TRACEPARENT[3:35]}-{context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }
    assert context_of([("traceparent", "nonsense")]) == {}


def test_what_was_raised_is_named_and_not_quoted() -> None:
    class Refused(Exception):
        cause = "no-prompt"

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    for error in (ValueError("what the prompt says"), Refused("what the prompt says")):
        with pytest.raises(type(error)), span(tracer, "stage"):
            raise error
    named, caused = exporter.get_finished_spans()
    assert (named.status.status_code, caused.status.status_code) == (StatusCode.ERROR, StatusCode.ERROR)
    assert [dict(s.attributes or {})["error.type"] for s in (named, caused)] == ["ValueError", "no-prompt"]
    assert "says" not in named.to_json() + caused.to_json()


def test_unknown_attributes_are_left_out() -> None:
    assert known(engine="e:1", cached_tokens=None, attempts=0) == {"kvatlas.engine": "e:1", "kvatlas.attempts": 0}


def test_log_lines_name_the_sampled_trace() -> None:
    tracer, record = TracerProvider(shutdown_on_exit=False).get_tracer("test"), logging.makeLogRecord({})
    assert TraceIds().filter(record)
    assert not hasattr(record, "trace_id")
    with span(tracer, "request", parent=context_of([("traceparent", TRACEPARENT)])):
        TraceIds().filter(record)
        context = get_current_span().get_span_context()
    told = record.__dict__
    assert (told["trace_id"], told["span_id"]) == (TRACEPARENT[3:35], f"{context.span_id:016x}")
