"""OpenTelemetry traces: off until an exporter is configured, by the variables every SDK reads.

`OTEL_TRACES_EXPORTER` (`otlp`, `console`, or any other that is installed), or an endpoint in
`OTEL_EXPORTER_OTLP_ENDPOINT` alone, turns them on; `OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*` and
`OTEL_EXPORTER_OTLP_*` are the SDK's to read. A context travels as W3C `traceparent` and `tracestate`.

Traces wrap: whoever is traced does not know of it, and with traces off the wrapper is not there. Spans are exported by
a thread of the SDK's, from a bounded queue that drops what is too much, so that an exporter that is slow or down
disturbs nobody. No span holds what an exception said, for that may quote a prompt: only its type, or its `cause`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

FLUSH_S = 5.0  # for the last spans to be exported, when a service stops
CARRIED: Final = frozenset({"traceparent", "tracestate"})
Attributes = dict[str, str | bool | int | float]
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """One service's traces. `close` exports what is left, for at most `FLUSH_S`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("kvatlas")

    async def close(self) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(done.set)

        # A daemon: with an exporter that is down this takes longer than anybody wants to wait.
        threading.Thread(target=flush, name="flush traces", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), FLUSH_S)
        except TimeoutError:
            log.warning("the last traces were not exported in time", extra={"waited_s": FLUSH_S})


def open_tracing(environ: Mapping[str, str], service: str) -> Tracing | None:
    """None: no exporter is configured, or none such is there, which is logged. `service`: its name by default."""
    wanted = _exporter_name(environ)
    if wanted is None:
        return None
    try:
        exporter = _exporter(wanted)
    except Exception as error:  # whatever somebody's exporter finds wrong with its settings
        log.warning("no traces: the exporter cannot be made", extra={"exporter": wanted, "why": str(error)[:300]})
        return None
    log.info("traces are exported", extra={"exporter": wanted})
    return _tracing(exporter, environ.get("OTEL_SERVICE_NAME") or service)


def _exporter_name(environ: Mapping[str, str]) -> str | None:
    """By which name its maker has registered it, as the SDK's own configuration reads the variables."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    default = "otlp" if any(environ.get(name) for name in endpoints) else "none"
    name = environ.get("OTEL_TRACES_EXPORTER", "").strip() or default
    if name != "otlp":
        return None if name == "none" else name
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name].strip() for name in protocols if environ.get(name)), "grpc")
    return "otlp_proto_http" if protocol == "http/protobuf" else f"otlp_proto_{protocol}"


def _exporter(name: str) -> SpanExporter:
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    hint = "; pip install 'kvatlas[otlp-http]'" if name == "otlp_proto_http" else ""
    raise LookupError(f"no exporter of this name is installed{hint}")


def _tracing(exporter: SpanExporter, service: str) -> Tracing:
    # Loaded only where there are traces: it costs every start and every process some megabytes.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


@contextlib.contextmanager
def span(
    tracer: Tracer,
    name: str,
    attributes: Attributes | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
) -> Iterator[Span]:
    """The current span for the block, a child of the current one or of `parent`'s. What is raised fails it."""
    with tracer.start_as_current_span(
        name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
    ) as started:
        try:
            yield started
        except BaseException as error:
            if "error.type" not in (getattr(started, "attributes", None) or ()):  # else somebody knew better
                failed(started, str(getattr(error, "cause", None) or type(error).__name__))
            raise


def failed(of: Span, why: str) -> None:
    """`why` is one of few: a status, a type, a cause."""
    of.set_status(StatusCode.ERROR)
    of.set_attribute("error.type", why)


def known(**attributes: str | float | None) -> Attributes:
    """`kvatlas.<name>`, without those that are not known."""
    return {f"kvatlas.{name}": value for name, value in attributes.items() if value is not None}


def context_of(headers: Iterable[tuple[str | bytes, str | bytes]]) -> Context:
    """Of whoever sent these headers, or this metadata; empty where they say nothing of a trace."""
    carrier = {}
    for name, value in headers:
        key = name.decode("latin-1") if isinstance(name, bytes) else name
        if key in CARRIED:
            carrier[key] = value.decode("latin-1") if isinstance(value, bytes) else value
    return _W3C.extract(carrier, Context())


def carried(of: Span | None = None) -> list[tuple[str, str]]:
    """The headers that make the next in line continue the trace, from `of` or from the current span."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, None if of is None else set_span_in_context(of))
    return list(carrier.items())


class TraceIds(logging.Filter):
    """Puts the trace and span a log line belongs to into its fields, where they are sampled."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = get_current_span().get_span_context()
        if context.is_valid and context.trace_flags.sampled:
            record.trace_id = f"{context.trace_id:032x}"
            record.span_id = f"{context.span_id:016x}"
        return True


def trace_logs() -> None:
    """Every line that is written from now on names its trace."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(already, TraceIds) for already in handler.filters):
            handler.addFilter(TraceIds())
