"""A lookup as part of the router's trace: wrappers around the gRPC service and the store, put there by app.py.

kvatlas.v1.KvIndex/Match             server, RPC: continues the router's span, from the call's metadata
  lookup                             memory: the index of this process
  MGET kvatlas                       redis: client, DB, one per prompt looked up
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind, Tracer

from kvatlas_common.fleet import Fleet
from kvatlas_common.matching import Holder, MatchAnswer, PromptKeys, Prompts
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.tracing import Attributes, context_of, failed, known, span
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_store import Lookup
from kvatlas_indexer.adapters.shared_index import SharedStore
from kvatlas_indexer.core.contracts import Lookups

MATCH = "kvatlas.v1.KvIndex/Match"
MODEL_CHARS_MAX = 128
CALL: Attributes = {"rpc.system.name": "grpc", "rpc.method": MATCH}
Handler = Any  # grpc.RpcMethodHandler, which is generic in its stubs alone


class TracedCalls(grpc.aio.ServerInterceptor):
    """A server span for every `Match`; the endless streams have none."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if details.method != f"/{MATCH}" or handler is None:
            return handler
        answer, parent = handler.unary_unary, context_of(details.invocation_metadata or ())

        async def match(
            request: pb.MatchRequest, context: grpc.aio.ServicerContext[pb.MatchRequest, pb.MatchResponse]
        ) -> pb.MatchResponse:
            attributes = CALL | known(
                model=request.model[:MODEL_CHARS_MAX],
                profiles=len(request.prompts),
                blocks=max((len(prompt.keys) // 8 for prompt in request.prompts), default=0),
                estimate=request.estimate,
            )
            with span(self._tracer, MATCH, attributes, kind=SpanKind.SERVER, parent=parent) as server:
                try:
                    response: pb.MatchResponse = await answer(request, context)
                except BaseException:
                    code = context.code()
                    server.set_attribute("rpc.response.status_code", getattr(code, "name", "UNKNOWN"))
                    raise
                server.set_attribute("rpc.response.status_code", "OK")
                server.set_attributes(known(engines=len(response.engines)))
                return response

        return grpc.unary_unary_rpc_method_handler(match, handler.request_deserializer, handler.response_serializer)


@dataclass(frozen=True, slots=True)
class TracedLookups:
    """`contracts.Lookups`."""

    inner: Lookups
    tracer: Tracer

    async def match(self, model: str, prompts: Prompts, engines: Collection[EngineId] = ()) -> MatchAnswer:
        with span(self.tracer, "lookup", {"kvatlas.store": "memory"}):
            return await self.inner.match(model, prompts, engines)

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        return await self.inner.holders(model, keys)

    def fleet(self) -> Fleet:
        return self.inner.fleet()


@dataclass(frozen=True, slots=True)
class TracedStore:
    """`SharedStore`. What is read in the background is nobody's trace."""

    inner: SharedStore
    tracer: Tracer

    async def lookup(self, keys: PromptKeys) -> Lookup:
        attributes: Attributes = {
            "db.system.name": "redis",
            "db.operation.name": "MGET",
            "db.operation.batch.size": len(keys),
            "kvatlas.store": "redis",
        }
        with span(self.tracer, "MGET kvatlas", attributes, kind=SpanKind.CLIENT) as client:
            found = await self.inner.lookup(keys)
            client.set_attributes(known(blocks_read=len(found.values)))
            if found.lost:
                failed(client, "lost")
            return found

    async def version(self) -> int:
        return await self.inner.version()

    async def records(self) -> tuple[int, dict[str, bytes]]:
        return await self.inner.records()
