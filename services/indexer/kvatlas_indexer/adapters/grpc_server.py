"""`kvatlas.v1.KvIndex` over an `Index`: what routers ask of an indexer, and tell it.

A request that cannot be answered is told why: `INVALID_ARGUMENT` names the field, `NOT_FOUND` the model,
`RESOURCE_EXHAUSTED` the limit. An observation that does not parse costs itself, not the stream it came in: routers of a
later version may say more than this one understands. Bytes that are no message at all are counted.

Stopping drains: health turns to NOT_SERVING, the endless streams end with UNAVAILABLE (routers go to another shard),
lookups under way are answered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvatlas_common import wire
from kvatlas_common.logs import LimitedLog
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.proto.kvatlas.v1 import index_pb2_grpc as pb_grpc
from kvatlas_indexer.adapters.addresses import AddressUnavailable, unavailable
from kvatlas_indexer.adapters.matches import PROFILES_MAX, Matches
from kvatlas_indexer.core.contracts import FleetDelta, Index, Reports

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["KvIndex"].full_name
MESSAGE_OVERHEAD_BYTES = 1 << 20  # names, engine subsets, framing
LOG_INTERVAL_S = 30.0  # what anybody can cause is logged so often
ROUTER_CHARS_MAX = 256
GRPC_LOG = logging.getLogger("grpc._cython.cygrpc")
TOO_LATE = "ExecuteBatchError"  # who asked had given up when the answer was ready; gRPC does not export the type

T = TypeVar("T")
Context = grpc.aio.ServicerContext[object, object]
ROUTER_METADATA = "kvatlas-router"
READS_MANY = ("kvatlas-reports", "many")


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """`keys_max`: block keys of one prompt; the default is a prompt of a million tokens in blocks of 16. `in_order`:
    a stream's lookups are answered one after the other, as an index in this process answers sooner than a task begins.
    """

    keys_max: int = 65_536
    in_order: bool = False

    @property
    def message_bytes_max(self) -> int:
        return self.keys_max * 8 * PROFILES_MAX + MESSAGE_OVERHEAD_BYTES


@dataclass(slots=True)
class Observed:
    """Counts since the start."""

    received: int = 0
    refused: int = 0  # did not parse
    unreadable: int = 0  # requests of any kind that are no protobuf
    too_late: int = 0  # answers that nobody waited for any more


class GrpcServer:
    """The gRPC side of an indexer, in the caller's event loop."""

    def __init__(
        self,
        index: Index,
        reports: Reports,
        options: GrpcOptions | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self.observed = Observed()
        options = options or GrpcOptions()
        self._draining = asyncio.Event()
        self._health = health_aio.HealthServicer()
        limited = LimitedLog(log, LOG_INTERVAL_S, time.monotonic)
        self._unreadable = _Unreadable(self.observed, limited)
        limit = options.message_bytes_max
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=(
                ("grpc.so_reuseport", 0),  # else a second indexer would silently take every other connection
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ),
        )
        servicer = _KvIndex(
            index=index,
            reports=reports,
            options=options,
            observed=self.observed,
            draining=self._draining,
            limited=limited,
        )
        pb_grpc.add_KvIndexServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), self._server
        )

    async def start(self, host: str, port: int) -> int:
        """Serve; answers the port (0 takes a free one). Raises `AddressUnavailable`."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        await _check_available(host, port, address)
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:  # gRPC does not say why
            raise AddressUnavailable("gRPC", address, str(error), "Check --grpc-listen.") from error
        GRPC_LOG.addFilter(self._unreadable)
        await self._server.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self, grace_s: float) -> None:
        """Drain: end the streams, answer the lookups under way for at most `grace_s`, then close."""
        await self._health.enter_graceful_shutdown()
        self._draining.set()
        await self._server.stop(grace_s)
        GRPC_LOG.removeFilter(self._unreadable)


class _Unreadable(logging.Filter):
    """gRPC logs bytes that are no message as an error of the service, with a traceback each: anybody could fill a disk.

    They are counted instead, with a line now and then. So are answers that come after their caller's deadline.
    """

    def __init__(self, observed: Observed, limited: LimitedLog) -> None:
        super().__init__()
        self._observed = observed
        self._limited = limited

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if type(error).__name__ == TOO_LATE:
            self._observed.too_late += 1
            return False
        if not isinstance(error, DecodeError):
            return True
        self._observed.unreadable += 1
        self._limited.warning("unreadable", "a gRPC request cannot be read", why=str(error))
        return False


class _KvIndex(pb_grpc.KvIndexServicer):
    def __init__(
        self,
        *,
        index: Index,
        reports: Reports,
        options: GrpcOptions,
        observed: Observed,
        draining: asyncio.Event,
        limited: LimitedLog,
    ) -> None:
        self._index = index
        self._reports = reports
        self._matches = Matches(index, options.keys_max, draining, self._answered_too_late, in_order=options.in_order)
        self._observed = observed
        self._draining = draining
        self._limited = limited

    def _answered_too_late(self) -> None:
        self._observed.too_late += 1

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        return await self._matches.one(request, context)

    async def MatchStream(self, requests: AsyncIterator[pb.StreamedMatch], context: Context) -> None:
        await self._matches.stream(requests, context)

    async def WatchFleet(self, request: pb.WatchFleetRequest, context: Context) -> AsyncIterator[pb.FleetUpdate]:
        router = request.router[:ROUTER_CHARS_MAX]
        self._limited.info(f"watch {router}", "a router watches the fleet", router=router)
        deltas = cast(AsyncGenerator[FleetDelta, None], self._index.watch(router))
        async with aclosing(deltas), aclosing(_until(self._draining, deltas)) as current:
            async for delta in current:
                yield pb.FleetUpdate(
                    snapshot=delta.snapshot,
                    engines=[wire.engine_message(view) for view in delta.changed],
                    removed=[str(engine) for engine in delta.removed],
                    loads=[wire.load_message(engine, load, time.monotonic()) for engine, load in delta.loads],
                )
        await context.abort(grpc.StatusCode.UNAVAILABLE, "this indexer is shutting down")

    async def Observe(self, requests: AsyncIterator[pb.Observation], context: Context) -> pb.ObserveSummary:
        router = _router(context)
        await context.send_initial_metadata((READS_MANY,))
        self._reports.joined(router)
        reading = asyncio.ensure_future(self._read(requests, router, context))
        stopped = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((reading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return pb.ObserveSummary(received=reading.result())
        finally:
            reading.cancel()
            stopped.cancel()
            await asyncio.gather(reading, stopped, return_exceptions=True)  # nobody wants them any more
            self._reports.left(router)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "this indexer is shutting down")
        raise AssertionError("an abort raises")

    async def _read(self, requests: AsyncIterator[pb.Observation], router: str, context: Context) -> int:
        """All there is to read; answers how many reports that were."""
        received = 0
        async for message in requests:
            for report in (message, *message.also):
                received += 1
                self._take(report, router, context)
        return received

    def _take(self, message: pb.Observation, router: str, context: Context) -> None:
        self._observed.received += 1
        try:
            observation = wire.observation(message)
        except ValueError as error:
            self._observed.refused += 1
            peer = context.peer()
            self._limited.warning("observation", "an observation is not understood", peer=peer, why=str(error))
            return
        self._reports.reported(router, observation)


def _router(context: Context) -> str:
    """Who reports; one that does not say is known by its connection."""
    for name, value in context.invocation_metadata() or ():
        if name == ROUTER_METADATA and isinstance(value, str) and value:
            return value[:ROUTER_CHARS_MAX]
    return context.peer()


async def _until(stop: asyncio.Event, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The items until `stop` is set or there are no more. `items` is left to its owner to close."""
    stopped = asyncio.ensure_future(stop.wait())
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(items))
            await asyncio.wait((stopped, coming), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        stopped.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)  # however it ends now, nobody wants it


async def _check_available(host: str, port: int, address: str) -> None:
    """Bind and let go: gRPC's own error does not say why. Raises `AddressUnavailable`."""
    if port == 0:
        return
    try:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), host, port)
    except OSError as error:
        number = error.errno if error.errno and error.errno > 0 else errno.EADDRNOTAVAIL  # a name that does not resolve
        raise unavailable("gRPC", address, number, "--grpc-listen") from error
    server.close()
    await server.wait_closed()
