"""A simulated engine as one object: options in, addresses out, and the truth about its cache for whoever checks.

It is an engine by all its wires (HTTP, KV events, replay) and simulated in what it computes. Any number of them run in
one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import zmq
from aiohttp import web
from opentelemetry.trace import Tracer

from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.fleet import Adapter
from kvatlas_loadtest.block_pool import PoolVersion
from kvatlas_loadtest.events import EventEncoder, WireVersion
from kvatlas_loadtest.hashing import profile_of
from kvatlas_loadtest.prompting import Prompter
from kvatlas_loadtest.publisher import EventPublisher, binds, open_ranks
from kvatlas_loadtest.rank import EngineRank
from kvatlas_loadtest.scheduler import EngineCore, EngineLimits
from kvatlas_loadtest.server import EngineApi, Serving, roomy_request
from kvatlas_loadtest.time_model import TimeModel
from kvatlas_loadtest.traced import traced
from kvatlas_loadtest.vocabulary import Vocabulary

TINY_MODEL = Path(__file__).parent / "models" / "tiny"
ANY_PORT = "tcp://127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one simulated engine, after `vllm serve`'s; the defaults are those of vLLM 0.32 where it has them.

    `version` decides the encoding of events, what extra keys a hash covers and how the pool reuses blocks.
    `events_endpoint` None: no KV events. Endpoints bind when they are wildcards or have port 0, and connect otherwise;
    rank N uses port + N. `topic` None: `kv@<host:port>@<model>`. `answer_tokens`: length of an answer whose request
    gives no `max_tokens`.
    """

    model: str = "tiny"
    model_path: Path = TINY_MODEL
    adapters: tuple[Adapter, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    version: WireVersion = WireVersion.V0_32
    limits: EngineLimits = field(default_factory=EngineLimits)
    hash_algorithm: str = Algorithm.SHA256
    hash_seed: str | None = None
    hashes_as_bytes: bool = False
    events_endpoint: str | None = ANY_PORT
    replay_endpoint: str | None = ANY_PORT
    topic: str | None = None
    data_parallel_size: int = 1
    api_key: str | None = None
    time_model: TimeModel = field(default_factory=TimeModel)
    seed: int = 0
    answer_tokens: int = 64
    debug: bool = False  # `/debug/block_table` and `/debug/faults` are answered, see `debug.py`

    def __post_init__(self) -> None:
        self.profile()
        if self.data_parallel_size < 1 or self.answer_tokens < 1:
            raise ValueError("data_parallel_size and answer_tokens are at least 1")

    def profile(self) -> HashProfile:
        """Raises `ValueError` where nobody could repeat the engine's keys."""
        extra_keys = {WireVersion.V0_10: ExtraKeys.LORA_ID, WireVersion.V0_32: ExtraKeys.TAGGED}
        return profile_of(
            self.hash_algorithm,
            self.hash_seed,
            self.limits.block_size,
            extra_keys.get(self.version, ExtraKeys.LORA_NAME),
        )

    def pool_limits(self) -> EngineLimits:
        """The limits with the pool rules of `version`."""
        pool = PoolVersion.V0_32 if self.version is WireVersion.V0_32 else PoolVersion.V0_10
        return replace(self.limits, version=pool)


@dataclass(slots=True)
class _Life:
    """From a start to the crash or stop: what a restart makes anew."""

    context: zmq.Context[zmq.Socket[bytes]]
    ranks: list[EngineRank]
    runner: web.ServerRunner
    server: web.Server


@dataclass(slots=True)
class SimulatedEngine:
    """`async with SimulatedEngine(config) as engine`. `prompter` and `vocabulary` may be shared with other engines.

    After a `crash`, `restart` brings it back on the same ports with an empty cache: a new epoch.
    """

    config: EngineConfig
    prompter: Prompter | None = None
    vocabulary: Vocabulary | None = None
    clock: Callable[[], float] = time.time
    tracer: Tracer | None = None
    address: str = field(default="", init=False)  # host:port, once started
    events_endpoint: str | None = field(
        default=None, init=False
    )  # of rank 0: where to subscribe, or where it connects to
    replay_endpoint: str | None = field(default=None, init=False)  # of rank 0
    _life: _Life | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def topic(self) -> str:
        return self.config.topic if self.config.topic is not None else f"kv@{self.address}@{self.config.model}"

    @property
    def running(self) -> bool:
        return self._life is not None

    def rank(self, number: int = 0) -> EngineRank:
        if self._life is None:
            raise RuntimeError(f"simulated engine {self.address} is not running")
        return self._life.ranks[number]

    def publisher(self, number: int = 0) -> EventPublisher:
        """Of one rank: `faults` makes its next messages go wrong."""
        publisher = self.rank(number).publisher
        if publisher is None:
            raise RuntimeError(f"simulated engine {self.address} publishes no events")
        return publisher

    def block_table(self, number: int = 0) -> dict[int, int]:
        """Block key -> copies on one rank, now: what an index must equal once every event has been applied."""
        return self.rank(number).core.copies()

    async def start(self, first_seq: int = 0) -> None:
        """Opens all sockets and begins. `first_seq`: what the first event message is numbered."""
        if self._life is not None:
            raise RuntimeError(f"simulated engine {self.address} is already running")
        if self.vocabulary is None:
            self.vocabulary = Vocabulary.load(self.config.model_path)
        if self.prompter is None:
            self.prompter = Prompter.load(self.config.model_path)
        ranks: list[EngineRank] = []
        api = self._api(ranks, self.prompter, self.vocabulary)
        handler = traced(api.handle, self.tracer) if self.tracer else api.handle
        server = web.Server(handler, request_factory=roomy_request, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=5.0)
        await runner.setup()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            await self._listen(runner)
            ranks += await self._make_ranks(context, first_seq)
        except BaseException:
            await runner.cleanup()
            context.term()
            raise
        for rank in ranks:
            rank.start()
        self._life = _Life(context, ranks, runner, server)

    async def stop(self) -> None:
        """Graceful: requests under way get up to five seconds."""
        if self._life is None:
            return
        life, self._life = self._life, None
        await life.runner.cleanup()
        await self._end(life)

    async def crash(self) -> None:
        """At once: connections are reset, unsent events lost, the cache gone."""
        if self._life is None:
            raise RuntimeError(f"simulated engine {self.address} is not running")
        life, self._life = self._life, None
        for site in list(life.runner.sites):
            await site.stop()
        for connection in list(life.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await life.server.shutdown(0.0)
        await life.runner.cleanup()
        await self._end(life)

    async def restart(self, first_seq: int = 0) -> None:
        """A new life on the same addresses, crashing the present one if there is one."""
        if self._life is not None:
            await self.crash()
        await self.start(first_seq)

    async def _end(self, life: _Life) -> None:
        for rank in life.ranks:
            await rank.stop()
        life.context.term()

    async def _listen(self, runner: web.ServerRunner) -> None:
        port = int(self.address.rpartition(":")[2]) if self.address else self.config.port
        await web.TCPSite(runner, self.config.host, port).start()
        host, bound = runner.addresses[0][:2]
        self.address = f"{host}:{bound}"

    def _api(self, ranks: list[EngineRank], prompter: Prompter, vocabulary: Vocabulary) -> EngineApi:
        config = self.config
        serving = Serving(
            model=config.model,
            root=str(config.model_path),
            adapters=config.adapters,
            profile=config.profile(),
            hashes_as_bytes=config.hashes_as_bytes,
            seed=config.seed,
            answer_tokens=config.answer_tokens,
            api_key=config.api_key,
            version=f"{config.version}.0",
            debug=config.debug,
        )
        return EngineApi(serving, ranks, prompter, vocabulary, self.clock, self.clock())

    async def _make_ranks(self, context: zmq.Context[zmq.Socket[bytes]], first_seq: int) -> list[EngineRank]:
        config = self.config
        numbers = tuple((adapter.name, adapter.number or 0) for adapter in config.adapters)
        encoder = EventEncoder(config.version, config.limits.block_size, lora_ids=numbers)
        publishers: Sequence[EventPublisher | None] = [None] * config.data_parallel_size
        if config.events_endpoint is not None:
            publishers = opened = await open_ranks(
                context,
                self.events_endpoint or config.events_endpoint,
                self.replay_endpoint or config.replay_endpoint,
                bind=binds(config.events_endpoint),
                topic=self.topic,
                first_seq=first_seq,
                ranks=config.data_parallel_size,
            )
            self.events_endpoint, self.replay_endpoint = opened[0].endpoint, opened[0].replay_endpoint
        return [
            EngineRank(
                EngineCore(config.pool_limits()),
                number,
                encoder,
                publisher,
                time_model=config.time_model,
                clock=self.clock,
            )
            for number, publisher in enumerate(publishers)
        ]
