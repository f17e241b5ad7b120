"""The indexer, composed: sources feed the core, the core's commands are performed, routers and people ask it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector

from kvatlas_common.blocks.profile import Algorithm
from kvatlas_common.engines.asking import open_session
from kvatlas_common.engines.discovery import watch
from kvatlas_common.engines.probe import EngineFacts, ProbePlan, Prober
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.findings import Code, Finding
from kvatlas_common.fleet import Fleet, Load
from kvatlas_common.lasting import keep_what_is_built
from kvatlas_common.tracing import Tracing, trace_logs
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.adapters.findings import Watch
from kvatlas_indexer.adapters.front import Front
from kvatlas_indexer.adapters.grpc_server import GrpcOptions, GrpcServer
from kvatlas_indexer.adapters.http_server import serve
from kvatlas_indexer.adapters.local_index import LocalIndex
from kvatlas_indexer.adapters.measured import MeasuredIndex
from kvatlas_indexer.adapters.metrics import IndexMetrics
from kvatlas_indexer.adapters.publisher import Publisher
from kvatlas_indexer.adapters.redis_client import open_redis
from kvatlas_indexer.adapters.redis_leases import RedisLeases
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_sweep import RedisSweep, sweep_forever
from kvatlas_indexer.adapters.replay_client import ReplayClient
from kvatlas_indexer.adapters.replays import Replays
from kvatlas_indexer.adapters.reports import Listener
from kvatlas_indexer.adapters.rest import build_app
from kvatlas_indexer.adapters.shard import Hands, Shard
from kvatlas_indexer.adapters.shared_index import SharedIndex
from kvatlas_indexer.adapters.soon import Soon
from kvatlas_indexer.adapters.traced import TracedCalls, TracedLookups, TracedStore
from kvatlas_indexer.adapters.zmq_sockets import new_context
from kvatlas_indexer.adapters.zmq_source import Origin, ZmqSource, ZmqSourceOptions
from kvatlas_indexer.core import advice
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.engine import Bounds
from kvatlas_indexer.core.healing import Healing
from kvatlas_indexer.core.index import Command, KvIndex, Rules
from kvatlas_indexer.core.loads import LoadBoard
from kvatlas_indexer.core.naming import Expected
from kvatlas_indexer.core.reading import Reading, read
from kvatlas_indexer.core.routing import Routing
from kvatlas_indexer.core.stream import Limits, ReplayEnd
from kvatlas_indexer.settings import IndexerSettings

log = logging.getLogger(__name__)

TICK_S = 0.25
FLEET_DELAY_S = 0.02  # changes of the fleet are told together
SCRAPED_DELAY_S = 0.05  # and figures of engines, which are older than that anyway
LOADS_GAP_S = 0.005
"""What routers have in flight is told to the others at once, but no more often: two routers that do not know of each
other's last request choose the same engine."""

SERVICE = "kvatlas-indexer"


class Indexer:
    """One shard. `start` binds everything or raises `AddressUnavailable`; `stop` drains and closes."""

    def __init__(
        self, settings: IndexerSettings, *, environ: Mapping[str, str], tracing: Tracing | None = None
    ) -> None:
        self.settings = settings
        self._tracing = tracing
        self.routing = Routing(estimate_ttl_s=settings.estimate_ttl_s)
        self.board = LoadBoard(self.routing.in_flight)
        self.watch = Watch(self._fleet, self._own_findings)
        self.index = KvIndex(_rules(settings), on_finding=self.watch.note, on_emptied=self.routing.forget)
        self.accuracy = Accuracy()
        self.healing = Healing(self.index, on_finding=self.watch.note)
        self.watch.attach(self.index, self.accuracy, self.healing.repetitions)
        self.ready = False
        self.zmq_endpoints: tuple[str, ...] = ()
        self.grpc_address = ""
        self.rest_address = ""
        self._environ = environ
        local = LocalIndex(self.index)
        lookups = TracedLookups(local, tracing.tracer) if tracing else local
        self._front = Front(lookups, self.routing, self.board, time.monotonic)
        self._listener = Listener(
            accuracy=self.accuracy,
            healing=self.healing,
            routing=self.routing,
            fleet=self._front.fleet,
            on_healed=lambda: self._perform(()),
            on_in_flight=self._on_in_flight,
            clock=time.monotonic,
            wall=time.time,
        )
        self._measured = MeasuredIndex(self._front)
        self._applying = Durations()  # from a message received to its being visible in lookups here
        self._store: SharedIndex | None = None
        self._shard: Shard | None = None
        self._publisher: Publisher | None = None
        self._store_evicts = ""
        self._stack = contextlib.AsyncExitStack()
        self._telling_fleet = Soon(self._tell_fleet, 0.0)
        self._telling_loads = Soon(self._front.wake, LOADS_GAP_S)
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        self.ready = True
        log.info(
            "indexer ready",
            extra={"zmq": list(self.zmq_endpoints), "grpc": self.grpc_address, "rest": self.rest_address},
        )

    async def _start(self) -> None:
        settings, context = self.settings, new_context()
        if self._tracing is not None:
            trace_logs()
            self._stack.push_async_callback(self._tracing.close)
        self._stack.callback(context.term)
        options = ZmqSourceOptions(settings.topic_prefix, message_bytes_max=settings.message_bytes_max)
        self._source = ZmqSource(
            context,
            lambda frames: read(frames, time.time()),
            self._on_message,
            options,
            on_connection=self._on_connection,
            on_turn=lambda: self._perform(()),
        )
        self._stack.callback(self._source.close)
        self._replays = Replays(ReplayClient(context), self._on_replayed, self._on_replay_end)
        self._stack.push_async_callback(self._replays.close)
        self.zmq_endpoints = self._source.listen(settings.zmq_listen, settings.listen_ranks)
        session = await self._stack.enter_async_context(open_session())
        prober = Prober(
            session,
            self._on_facts,
            self._on_load,
            self.watch.worked,
            clock=time.monotonic,
            wall=time.time,
            rng=random.Random(),
            plan=ProbePlan(versions=True),
        )
        self._prober = await self._stack.enter_async_context(prober)
        shared = [] if settings.store == "memory" else await self._share()
        self._run_in_background(self._discover(), self._tick(), self._sweep(), self.watch.run(), *shared)
        await self._serve()

    async def _share(self) -> list[Coroutine[object, object, None]]:
        """Joins the shared index as one of its shards; answers what is to run in the background."""
        settings = self.settings
        client = await open_redis(
            settings.store,
            prefix=settings.store_prefix,
            partitions=settings.store_partitions,
            evictions_allowed=settings.allow_evicting_store,
        )
        self._stack.push_async_callback(client.aclose)
        self._store_evicts = client.evicts
        store = RedisStore(client, block_ttl_s=settings.block_ttl_s)
        publisher = self._publisher = Publisher(self.index, store, clock=time.monotonic)
        name = settings.shard or f"{socket.gethostname()}:{os.getpid()}"
        tracing = self._tracing
        read = TracedStore(store, tracing.tracer) if tracing else store
        shared = SharedIndex(read, on_change=self._front.wake, on_emptied=self.routing.forget)
        self._front.lookups = self._store = shared
        shard = self._shard = Shard(
            name=name,
            index=self.index,
            store=store,
            leases=RedisLeases(client, client.prefix, name),
            publisher=publisher,
            hands=Hands(self._own, self._apply, self._perform),
            recorded=lambda: {engine.address for engine in shared.fleet().engines},
            clock=time.monotonic,
            wall=time.time,
        )
        publisher.lost = shard.lost
        self._stack.push_async_callback(shard.leave)
        sweep = RedisSweep(client, name, block_ttl_s=settings.block_ttl_s)
        return [shared.run(), publisher.run(), shard.run(), sweep_forever(sweep, shared.live_slots)]

    async def _serve(self) -> None:
        settings = self.settings
        interceptors = (TracedCalls(self._tracing.tracer),) if self._tracing else ()
        options = GrpcOptions(in_order=settings.store == "memory")
        grpc = GrpcServer(self._measured, self._listener, options, interceptors)
        host, port = _split(settings.grpc_listen)
        self.grpc_address = f"{host}:{await grpc.start(host, port)}"
        self._stack.push_async_callback(grpc.stop, settings.drain_s)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(
            IndexMetrics(
                self.index,
                self.accuracy,
                self.healing,
                self.routing,
                self.watch.counts,
                received=self._source.received,
                observed=grpc.observed,
                applying=self._applying,
                lookups=self._measured,
                publisher=self._publisher,
                shared=self._store,
            )
        )
        host, port = _split(settings.rest_listen)
        app = build_app(
            self._measured,
            ready=lambda: self.ready,
            registry=registry,
            blocks=self._blocks,
            findings=self.watch.current,
        )
        rest = await serve(app, host, port)
        self.rest_address = f"{host}:{rest.port}"
        self._stack.push_async_callback(rest.stop)

    async def stop(self) -> None:
        """Lookups under way are answered first, for at most `drain_s`."""
        self.ready = False
        self._telling_fleet.stop()
        self._telling_loads.stop()
        await self._stack.aclose()
        log.info("indexer stopped")

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, or a task of its own fails: that is raised."""
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        await self.start()
        keep_what_is_built()
        waiting = [asyncio.create_task(asked.wait()), asyncio.create_task(self.until_failed())]
        try:
            ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await self.stop()
        for task in ended:
            task.result()

    async def until_failed(self) -> None:
        """None of the background tasks ends by itself: what ended one is raised."""
        ended, _ = await asyncio.wait(self._background, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()

    def _run_in_background(self, *coroutines: Coroutine[object, object, None]) -> None:
        self._background = [asyncio.create_task(coroutine) for coroutine in coroutines]
        self._stack.push_async_callback(self._end_background)

    async def _end_background(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _on_message(self, origin: Origin, reading: Reading) -> None:
        if self._shard is None or self._shard.admits(origin, reading):
            self._apply(origin, reading)

    def _apply(self, origin: Origin, reading: Reading) -> None:
        commands = self.index.on_read(
            reading, time.time(), peer=origin.peer, dialled=origin.dialled, port_rank=origin.port_rank
        )
        if commands:
            self._perform(commands)
        self._applying.add_between(reading.came, time.time())

    def _on_connection(self, engine: EngineId, up: bool) -> None:
        if up:
            self._prober.hurry(engine.address)  # it may be another life of the engine
        self._perform(self.index.on_connection(engine, up, time.time()))

    def _on_replayed(self, engine: EngineId, seq: int, payload: bytes) -> None:
        self._perform(self.index.on_replayed(engine, seq, payload, time.time()))

    def _on_replay_end(self, engine: EngineId, end: ReplayEnd) -> None:
        self._perform(self.index.on_replay_end(engine, end, time.time()))

    def _on_facts(self, facts: EngineFacts) -> None:
        self._perform(self.index.on_facts(facts, time.time()))

    def _on_load(self, engine: EngineId, load: Load) -> None:
        if self.board.scraped(engine, load):
            self._telling_loads.within(SCRAPED_DELAY_S)

    def _on_in_flight(self) -> None:
        if self.board.in_flight_changed():
            self._telling_loads.within(0.0)

    def _on_specs(self, specs: Iterable[EngineSpec]) -> None:
        if self._shard is not None:
            self._shard.on_specs(specs)
        else:
            self._own(specs)

    def _own(self, specs: Iterable[EngineSpec]) -> None:
        """These are this process's to index."""
        self._perform(self.index.on_specs(specs, time.time()))
        dialled = {
            engine: endpoint
            for spec in specs
            for engine in spec.ids
            if (endpoint := spec.events_endpoint(engine.rank)) is not None
        }
        for engine, why in self._source.set_dialled(dialled).items():
            self.watch.note(engine, Finding(Code.CANNOT_DIAL, why, change="correct events= at --engine"))

    def _perform(self, commands: Iterable[Command]) -> None:
        for command in commands:
            self._replays.perform(command)
        if self._publisher is not None:
            self._publisher.touched()
        if self.index.fleet_is_stale:
            self._telling_fleet.within(FLEET_DELAY_S)

    def _tell_fleet(self) -> None:
        self.index.fleet()
        self.board.speak_of([known.id for known in self.index.known()])
        self._prober.want(self.index.watched())
        self._front.wake()

    def _blocks(self, engine: EngineId) -> dict[Medium, int]:
        known = self.index.engine(engine)
        return known.blocks() if known else {}

    def _fleet(self) -> Fleet:
        return self._front.fleet()

    def _own_findings(self) -> Iterator[Finding]:
        """What is wrong with this shard, whatever its engines do."""
        if self._store_evicts:
            yield advice.store_evicts(self._store_evicts)
        if self._shard is not None and self._shard.away:
            yield advice.store_unreachable()

    # -- what goes on --------------------------------------------------------------------------------------------------

    async def _discover(self) -> None:
        settings = self.settings
        engines = watch(
            settings.engines,
            defaults=settings.engine_defaults(),
            environ=self._environ,
            refresh_s=settings.engine_refresh_s,
        )
        async with contextlib.aclosing(engines):
            async for specs in engines:
                log.info("engines wanted", extra={"engines": sorted(spec.address for spec in specs)})
                self._on_specs(specs)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._perform(self.index.on_tick(time.time()))
            self._listener.on_tick()

    async def _sweep(self) -> None:
        while True:
            busy = self.index.residency.sweep()
            await asyncio.sleep(0.001 if busy else TICK_S)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _rules(settings: IndexerSettings) -> Rules:
    algorithm = settings.prefix_caching_hash_algo
    return Rules(
        expected=Expected(Algorithm(algorithm) if algorithm else None, settings.hash_seed, settings.block_size),
        may_reproduce=not settings.recompute_keys,
        engine_port=settings.engine_port,
        engine_lease_s=settings.engine_lease_s,
        forget_after_s=settings.forget_after_s,
        limits=Limits(held_back_max=settings.held_back_max),
        bounds=Bounds(blocks_max=settings.blocks_max, doubt_ttl_s=settings.doubt_ttl_s),
    )
