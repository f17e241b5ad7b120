"""A simulated engine in its clients' traces: one server span per completion, named as vLLM 0.32 names its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from opentelemetry.trace import SpanKind, Tracer

from kvatlas_common.tracing import context_of, span

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def traced(handler: Handler, tracer: Tracer) -> Handler:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        parent = context_of((name.lower(), value) for name, value in request.headers.items())
        with span(tracer, "llm_request", {"url.path": request.path}, kind=SpanKind.SERVER, parent=parent):
            return await handler(request)

    return handle
