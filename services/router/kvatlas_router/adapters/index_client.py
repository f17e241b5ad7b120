"""The indexers, as a router uses them: look up, watch the fleet and its load, report.

Every address behind a target is one shard, and any shard answers any lookup. The `WatchFleet` stream doubles as the
sign of life: a shard without one is not asked at all, so that a router with every indexer down decides without waiting.
A shard that has a stream but answers no lookups is left alone by its circuit. A lookup goes to one shard, after a part
of the deadline to a second one too; the first answer wins. That a lookup failed, and why, is an answer of its own
(`LookupFailed`), never an empty match.

A stream of reports begins with the requests in flight, so that a shard that comes up, or comes back, counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
import numpy as np

from kvatlas_common.fleet import Fleet, Load
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.observations import Observation
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.proto.kvatlas.v1 import index_pb2_grpc as rpc
from kvatlas_common.wire import (
    engine_load,
    engine_view,
    match_answer,
    match_request,
    observation_message,
)
from kvatlas_common.words import EngineId
from kvatlas_router.adapters import background
from kvatlas_router.adapters.match_stream import CALL_IS_OVER, MatchStream, Refused
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.adapters.open_requests import OpenRequests
from kvatlas_router.adapters.outbox import Outbox
from kvatlas_router.core.circuit import Circuit
from kvatlas_router.core.loads import MergedLoads

log = logging.getLogger(__name__)

HEDGE_AFTER = 0.5  # of the deadline
OWN = "this router"  # among those who tell of loads
ROUTER_METADATA = "kvatlas-router"
READS_MANY = ("kvatlas-reports", "many")
SHARDS_MAX = 64
RESOLVE_EVERY_S = 10.0
_RECONNECT_S = (0.1, 0.5)
_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)


Interceptors = Callable[[str], Sequence[grpc.aio.ClientInterceptor]]


class LookupFailed(Exception):
    """No answer. `cause`: `index-unavailable`, `deadline`, `unknown-model` or `index-error`."""

    def __init__(self, cause: str, text: str = "") -> None:
        super().__init__(text or cause)
        self.cause = cause


class Shard:
    """One indexer: its channel, its fleet as last told, and what is still to be reported to it.

    `loads` takes what it tells of them; `open_requests` are what its stream of reports begins with.
    """

    def __init__(
        self,
        address: str,
        router: str,
        changed: Callable[[], None],
        dropped: Callable[[], None],
        *,
        loads: MergedLoads | None = None,
        open_requests: OpenRequests | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> None:
        self.address = address
        self.circuit = Circuit()
        self.fleet: Fleet | None = None  # None: its stream is down
        self.why_down = "no answer yet"
        self._router = router
        self._changed = changed
        self._loads = loads or MergedLoads()
        self._open_requests = open_requests or OpenRequests()
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)
        self._stub: Any = rpc.KvIndexStub(self._channel)  # type: ignore[no-untyped-call]
        self._outbox = Outbox(dropped)
        self._tasks = [
            background.start(self._forever("fleet stream", self._watch), f"fleet stream of {address}"),
            background.start(self._forever("observations", self._report), f"observations to {address}"),
        ]
        self._stream = MatchStream(self._stub)
        if not interceptors:  # a call that is traced needs metadata of its own
            self._tasks.append(background.start(self._stream.run(), f"lookups at {address}"))

    async def match(self, request: pb.MatchRequest, timeout_s: float) -> MatchAnswer:
        try:
            if self._stream.up:
                response = await self._stream.match(request, timeout_s)
            else:
                response = await self._stub.Match(request, timeout=timeout_s)
            answer = match_answer(response)
        except Refused as refused:
            raise self._failure(refused.code, refused.details) from None
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.code(), error.details() or "") from None
        except ValueError as error:
            raise LookupFailed("index-error", str(error)) from None
        self.circuit.succeeded()
        return answer

    def report(self, message: pb.Observation) -> None:
        self._outbox.put(message)

    async def close(self) -> None:
        for task in self._tasks:
            await background.stop(task)
        await self._channel.close()

    def _failure(self, code: grpc.StatusCode, details: str) -> LookupFailed:
        if code is grpc.StatusCode.NOT_FOUND:
            self.circuit.succeeded()
            return LookupFailed("unknown-model", details)
        self.circuit.failed(time.monotonic())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return LookupFailed("deadline", f"{self.address} did not answer in time")
        cause = "index-unavailable" if code is grpc.StatusCode.UNAVAILABLE else "index-error"
        return LookupFailed(cause, f"{self.address}: {code.name} {details}"[:300])

    async def _watch(self, connected: Callable[[], None]) -> None:
        try:
            async for update in self._stub.WatchFleet(pb.WatchFleetRequest(router=self._router)):
                connected()
                now = time.monotonic()
                loads = [engine_load(message, now) for message in update.loads]
                self._loads.told(self.address, loads, snapshot=update.snapshot)
                if not (update.snapshot or update.engines or update.removed):
                    continue
                base = Fleet() if update.snapshot or self.fleet is None else self.fleet
                self.fleet = base.updated(map(engine_view, update.engines), map(EngineId.parse, update.removed))
                self._changed()
        finally:
            self._loads.lost(self.address)
            if self.fleet is not None:
                self.fleet = None
                self._changed()

    async def _report(self, connected: Callable[[], None]) -> None:
        self._outbox.many = False
        call = self._stub.Observe(metadata=((ROUTER_METADATA, self._router),))
        hearing = background.start(self._hear_what_it_reads(call), f"what {self.address} reads")
        telling = background.start(self._tell(call, connected), f"telling {self.address}")
        try:
            await call
        finally:
            await background.stop(telling)
            await background.stop(hearing)

    async def _hear_what_it_reads(self, call: grpc.aio.StreamUnaryCall[Any, Any]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # which whoever reports is told
            self._outbox.many = READS_MANY in map(tuple, await call.initial_metadata() or ())

    async def _tell(self, call: grpc.aio.StreamUnaryCall[Any, Any], connected: Callable[[], None]) -> None:
        """Until the call is over. Given an iterator, gRPC would wait for more of it even then, and lose that."""
        with contextlib.suppress(*CALL_IS_OVER):
            for message in self._open_requests.again():
                await call.write(message)
            while True:
                message = await self._outbox.take()
                try:
                    await call.write(message)
                except BaseException:
                    self._outbox.put_back(message)
                    raise
                connected()

    async def _forever(self, what: str, run: Callable[[Callable[[], None]], Coroutine[Any, Any, None]]) -> None:
        """Runs a stream again whenever it ends, with a growing pause until it has connected once more."""
        shortest, longest = _RECONNECT_S
        pause = shortest

        def connected() -> None:
            nonlocal pause
            if pause != shortest:
                log.info("indexer is back", extra={"indexer": self.address, "stream": what})
            pause = shortest

        while True:
            try:
                await run(connected)
                why = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name} {error.details()}"[:300]
            except ValueError as error:
                why = f"it sent what does not parse: {error}"[:300]
            except Exception as error:  # a defect here or in grpc must not end the watching for good
                why = f"{error!r}"[:300]
            self.why_down = why
            if pause == shortest:
                log.warning("indexer lost", extra={"indexer": self.address, "stream": what, "why": why})
            pause = min(pause * 2, longest)
            await asyncio.sleep(pause)


class IndexClient:
    """All shards behind some targets, each `<host:port>`; names are resolved again as time passes.

    `interceptors`: of the calls to the shard at an address.
    """

    def __init__(
        self,
        targets: Iterable[str],
        router: str,
        deadline_s: float,
        metrics: Metrics,
        interceptors: Interceptors = lambda address: (),
    ) -> None:
        self._targets = tuple(targets)
        self._router = router
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._interceptors = interceptors
        self._shards: dict[str, Shard] = {}
        self.on_load: Callable[[EngineId, Load], None] | None = None
        self._loads = MergedLoads(self._load_told)
        self._open_requests = OpenRequests()
        self._unresolved: dict[str, str] = {}
        self._turn = 0
        self._changed = asyncio.Event()
        self._resolving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> IndexClient:
        self._resolving = background.start(self._keep_resolving(), "resolving indexers")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        if self._resolving is not None:
            await background.stop(self._resolving)
        await asyncio.gather(*(s.close() for s in self._shards.values()))

    @property
    def available(self) -> bool:
        """Whether any shard's stream is up."""
        return any(s.fleet is not None for s in self._shards.values())

    def lost(self) -> dict[str, str]:
        """Why a shard's stream is down, or a target's name does not resolve."""
        down = {s.address: s.why_down for s in self._shards.values() if s.fleet is None}
        return down | self._unresolved

    def fleets(self) -> list[Fleet]:
        """What each shard whose stream is up says of the fleet."""
        return [s.fleet for s in self._shards.values() if s.fleet is not None]

    def loads(self) -> Mapping[EngineId, Load]:
        """The latest load of each engine that anybody tells of: one mapping, which changes as they tell."""
        return self._loads.latest

    def _load_told(self, engine: EngineId, load: Load) -> None:
        if self.on_load is not None:
            self.on_load(engine, load)

    def measured(self, engine: EngineId, load: Load) -> None:
        """This router has scraped it itself. `Load()`: it does so no more."""
        self._loads.told(OWN, [(engine, load)])

    async def changed(self) -> None:
        """Waits until `fleets` may have changed since the last call returned."""
        await self._changed.wait()
        self._changed.clear()

    async def match(
        self, model: str, prompts: Mapping[str, np.ndarray[Any, Any]], *, estimate: bool = False
    ) -> MatchAnswer:
        """`prompts`: profile name -> uint64[n]; `estimate`: from where prompts were routed, not from the index.

        Raises `LookupFailed` within the deadline.
        """
        try:
            answer = await self._match(match_request(model, prompts, estimate=estimate))
        except LookupFailed as failure:
            self._metrics.lookups.labels(failure.cause).inc()
            raise
        self._metrics.lookups.labels("ok").inc()
        return answer

    async def _match(self, request: pb.MatchRequest) -> MatchAnswer:
        now = time.monotonic()
        asked = [s for s in self._in_turn() if s.fleet is not None and s.circuit.allows(now)][:2]
        if not asked:
            raise LookupFailed("index-unavailable", "no indexer is up")
        if len(asked) == 1:
            return await asked[0].match(request, self._deadline_s)
        return await self._hedged(asked[0], asked[1], request, now + self._deadline_s)

    def observe(self, observation: Observation) -> None:
        """Tells every shard, later, or never if it is slow."""
        if self._shards:
            message = observation_message(observation)
            self._open_requests.keep(observation, message)
            for shard in self._shards.values():
                shard.report(message)

    def _told(self) -> None:
        self._metrics.shards_up.set(len(self.fleets()))
        self._changed.set()

    def _in_turn(self) -> list[Shard]:
        shards = list(self._shards.values())
        self._turn += 1
        start = self._turn % max(len(shards), 1)
        return shards[start:] + shards[:start]

    async def _hedged(self, first: Shard, second: Shard, request: pb.MatchRequest, until: float) -> MatchAnswer:
        """The second is asked when the first fails or has used up its part of the deadline."""
        running = {asyncio.create_task(first.match(request, self._deadline_s))}
        try:
            await asyncio.wait(running, timeout=self._deadline_s * HEDGE_AFTER)
            done = next(iter(running))
            if done.done() and not _failed(done):
                return done.result()
            running.add(asyncio.create_task(second.match(request, max(until - time.monotonic(), 0.001))))
            failure: LookupFailed | None = None
            while pending := {t for t in running if not t.done() or not _failed(t)}:
                finished, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    if not (failed := _failed(task)):
                        return task.result()
                    failure = failed
            raise failure or LookupFailed("index-unavailable")
        finally:
            for task in running:
                task.cancel()

    async def _keep_resolving(self) -> None:
        while True:
            await self._resolve()
            await asyncio.sleep(RESOLVE_EVERY_S)

    async def _resolve(self) -> None:
        found: dict[str, None] = {}
        self._unresolved = {}
        for target in self._targets:
            try:
                found |= dict.fromkeys(await _addresses(target))
            except OSError as error:
                # A name server that is down says nothing about the indexers: those known by now are kept.
                log.warning("indexer name does not resolve", extra={"indexer": target, "error": str(error)})
                found |= dict.fromkeys(self._shards)
                self._unresolved[target] = f"its name does not resolve: {error}"
        addresses = list(found)[:SHARDS_MAX]
        gone = [self._shards.pop(a) for a in self._shards.keys() - set(addresses)]
        for address in addresses:
            if address not in self._shards:
                self._shards[address] = Shard(
                    address,
                    self._router,
                    self._told,
                    self._metrics.observations_dropped.inc,
                    loads=self._loads,
                    open_requests=self._open_requests,
                    interceptors=self._interceptors(address),
                )
        if gone:
            await asyncio.gather(*(s.close() for s in gone))
            self._told()


def _failed(task: asyncio.Task[MatchAnswer]) -> LookupFailed | None:
    error = task.exception()
    if error is None or isinstance(error, LookupFailed):
        return error
    raise error


async def _addresses(target: str) -> list[str]:
    """Every address of `<host:port>`; one family only, since a host's IPv4 and IPv6 address are the same indexer."""
    host, _, port = target.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family = min((f for f, *_ in found), default=None)
    ips = [str(address[0]) for f, *_, address in found if f == family]
    return sorted({f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips})
