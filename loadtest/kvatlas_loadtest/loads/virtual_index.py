"""The indexer's own core, fed by simulated engines: every event goes through streams, epochs, replay and residency,
and what routers report through its books and histories.

What differs from a real shard is the wire: a message becomes visible a fixed delay after it was published, and may be
lost. Messages are handed over as values; encoding them would cost more than all the rest (the encoder and the decoder
have tests of their own). An engine answers replays from its last 10,000 messages, as vLLM does.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.types import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import EngineView, Head, Health, InFlight
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.observations import Observation
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.effects import Message, ReplayEnd
from kvatlas_indexer.core.index import Command, KvIndex, Replay, Rules
from kvatlas_indexer.core.naming import Expected
from kvatlas_indexer.core.routing import Routing
from kvatlas_loadtest.events import FULL_ATTENTION
from kvatlas_loadtest.kv_events import KvEvent, Removed, Stored, key_of

ESTIMATE_TTL_S = 600.0  # the indexer's default
EPOCH_S = 1_700_000_000.0  # the index wants seconds since 1970; a load begins here
MODEL = "reference"
REPLAYED_MAX = 10_000
_TICK_S = 0.25
_encode = msgspec.msgpack.Encoder().encode
_NOTHING = msgspec.Raw(b"\x90")
_NO_EXTRAS = msgspec.Raw(b"\xc0")


@dataclass(frozen=True, slots=True)
class Wires:
    """`delay_s`: from published to visible. `lost_share`: of the messages, 0..1. `replay`: engines can be asked again.

    `share_s`: from a router's report until other routers see it. `chance`: draws from [0, 1).
    """

    chance: Callable[[], float]
    delay_s: float = 0.005
    share_s: float = 0.005
    lost_share: float = 0.0
    replay: bool = True


@dataclass(slots=True)
class _Publisher:
    """One life of an engine's event stream."""

    engine: EngineId
    life: int = 0
    seq: int = 0
    kept: deque[Message] = field(default_factory=lambda: deque(maxlen=REPLAYED_MAX))


class VirtualIndex:
    """Times are seconds of the load; `now` never goes back."""

    def __init__(
        self, engines: Iterable[EngineId], cache: CacheConfig, *, profile: HashProfile, wires: Wires, routers: int
    ) -> None:
        self.findings: list[Finding] = []
        self.lost = 0
        self._profile = profile
        self._wires = wires
        expected = Expected(profile.algorithm, profile.seed, profile.block_size)
        self._routing = Routing(estimate_ttl_s=ESTIMATE_TTL_S)
        self._index = KvIndex(
            Rules(expected),
            on_finding=lambda _, finding: self.findings.append(finding),
            on_emptied=self._routing.forget,
        )
        self._cache = cache
        for router in range(routers):
            self._routing.in_flight.joined(str(router))
        self._publishers = {engine: _Publisher(engine) for engine in engines}
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._counter = count()
        self._ticked_at = 0.0
        replay = "tcp://engine:5558" if wires.replay else None
        specs = [EngineSpec(e.address, f"http://{e.address}", "tcp://engine:5557", replay) for e in self._publishers]
        self._obey(self._index.on_specs(specs, EPOCH_S), 0.0)
        for engine in self._publishers:
            self._obey(self._index.on_connection(engine, True, EPOCH_S), 0.0)
            self.health(engine, Health.READY, 0.0)
        self.catch_up(wires.delay_s)

    # -- what engines do ----------------------------------------------------------------------------------------------

    def publish(self, engine: EngineId, at_s: float, events: Sequence[KvEvent]) -> None:
        """One step's events. Of token ids only those of a prompt's first block are told: nobody reads others."""
        publisher = self._publishers[engine]
        batch = EventBatch(EPOCH_S + at_s, 0, tuple(map(self._event, events)))
        message = Message(publisher.seq, publisher.life << 40 | publisher.seq, 64, batch)
        publisher.seq += 1
        if self._wires.replay:
            publisher.kept.append(message)
        if self._wires.lost_share and self._wires.chance() < self._wires.lost_share:
            self.lost += 1
            return
        life = publisher.life
        self._at(at_s + self._wires.delay_s, lambda now: self._hear(publisher, life, message, now))

    def crashed(self, engine: EngineId) -> None:
        """What it would have published later, it never did; its next life begins at 0."""
        publisher = self._publishers[engine]
        publisher.life += 1
        publisher.seq = 0
        publisher.kept.clear()

    def health(self, engine: EngineId, health: Health, at_s: float) -> None:
        """As a probe finds it."""
        facts = EngineFacts(engine, health, frozenset({MODEL}), cache=self._cache)
        self._obey(self._index.on_facts(facts, EPOCH_S + at_s), at_s)

    # -- what routers see ---------------------------------------------------------------------------------------------

    def catch_up(self, now: float) -> None:
        """Applies all that has become visible by `now`."""
        while self._due and self._due[0][0] <= now:
            at_s, _, act = heapq.heappop(self._due)
            act(at_s)
        if now - self._ticked_at >= _TICK_S:
            self._ticked_at = now
            self._obey(self._index.on_tick(EPOCH_S + now), now)
            self._routing.on_tick(now, self._index.fleet())

    def held(self, keys: Sequence[int]) -> MatchAnswer:
        """What each engine holds of a prompt, and is expected to, as far as the index has caught up."""
        prompts = {self._profile.name: keys}
        return self._routing.expect(self._index.match(MODEL, prompts), self._index.fleet(), MODEL, prompts, ())

    def estimated(self, keys: Sequence[int], now: float) -> MatchAnswer:
        """What each should hold by what was sent to it."""
        return self._routing.estimate(self._index.fleet(), MODEL, {self._profile.name: keys}, (), now)

    def others(self, engine: EngineId, router: int) -> InFlight:
        """What routers but this one have told of."""
        return self._routing.in_flight.others(engine, str(router))

    def head(self, engine: EngineId, router: int) -> Head:
        """The prompt it is computing, as this one is told."""
        return self._routing.in_flight.head(engine, str(router))

    def report(self, router: int, observation: Observation, at_s: float) -> None:
        self._at(
            at_s + self._wires.share_s,
            lambda now: self._routing.observe(str(router), observation, self._index.fleet(), now),
        )

    def views(self) -> tuple[EngineView, ...]:
        """In the order of their ids."""
        return tuple(self._index.fleet().engines.values())

    def table(self, engine: EngineId) -> dict[int, int]:
        """Block key -> copies, as the index has them: to be compared with the engine's own."""
        return {key: copies for (_, _, key), copies in self._index.residency.table(engine).items()}

    # -- within -------------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._counter), act))

    def _hear(self, publisher: _Publisher, life: int, message: Message, now: float) -> None:
        if life == publisher.life:
            self._obey(self._index.on_message(publisher.engine, message, EPOCH_S + now), now)

    def _obey(self, commands: Iterable[Command], now: float) -> None:
        for command in commands:
            if isinstance(command, Replay):
                publisher, first = self._publishers[command.engine], command.first_seq
                self._at(now + command.delay_s + self._wires.delay_s, self._replaying(publisher, first))

    def _replaying(self, publisher: _Publisher, first: int) -> Callable[[float], None]:
        def act(now: float) -> None:
            at = EPOCH_S + now
            for message in list(publisher.kept):
                if message.seq >= first and message.ts <= at:
                    self._obey(self._index.on_replayed_message(publisher.engine, message, at), now)
            self._obey(self._index.on_replay_end(publisher.engine, ReplayEnd.COMPLETE, at), now)

        return act

    def _event(self, event: KvEvent) -> Event:
        if isinstance(event, Removed):
            return BlockRemoved((key_of(event.hash),), Medium.GPU, 0)
        if not isinstance(event, Stored):
            return AllBlocksCleared()
        tokens, extras = _NOTHING, _NO_EXTRAS
        if event.parent is None:
            size = self._profile.block_size
            tokens = msgspec.Raw(_encode([*event.token_ids[:size], *[0] * (size * (len(event.hashes) - 1))]))
            extras = msgspec.Raw(_encode(event.extra_keys))
        return BlockStored(
            keys=event.hashes,  # type: ignore[arg-type]  # simulated engines publish integers
            full=None,
            parent=event.parent,  # type: ignore[arg-type]
            parent_full=None,
            block_size=self._profile.block_size,
            medium=Medium.GPU,
            group=0,
            kind=FULL_ATTENTION,
            window=None,
            lora_id=None,
            lora_name=None,
            raw_token_ids=tokens,
            raw_extra_keys=extras,
        )
