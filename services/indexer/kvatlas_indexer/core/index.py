"""The index as a whole: every engine, the residency they share, and what a lookup answers.

Three kinds of things happen to it: frames come in (`on_frames`, `on_replayed`, `on_replay_end`), discovery and probes
say what there is (`on_specs`, `on_facts`), and time passes (`on_tick`). Each returns what the caller must do on the
network; all else is done when it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import xxhash

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.decode import decode_batch, decode_seq, decode_topic
from kvatlas_common.events.types import EventBatch, MalformedBatch, RejectedEvent, Rejection
from kvatlas_common.fleet import Adapter, EngineView, Fleet, Health, Sync
from kvatlas_common.matching import EngineMatch, Holder, MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.claims import Claims
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.engine import Bounds, Engine, Network
from kvatlas_indexer.core.match import Plan
from kvatlas_indexer.core.naming import Expected, Finding, Naming
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.stream import CancelReplay, Limits, Message, ReplayEnd, RequestReplay, Stream

ENGINES_MAX = 4096
"""Engines known at once. A listened name beyond is refused: names come from the network."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the index is told at its start."""

    expected: Expected = field(default_factory=Expected)
    may_reproduce: bool = True
    engine_port: int = 8000
    engine_lease_s: float = 15.0
    forget_after_s: float = 600.0  # how long a dead engine's blocks are kept, should it come back unharmed
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask `endpoint` for the messages of `engine` from `first_seq` on, after `delay_s`."""

    engine: EngineId
    endpoint: str
    first_seq: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class StopReplay:
    engine: EngineId


Command: TypeAlias = Replay | StopReplay


@dataclass(slots=True)
class _Known:
    """What is known of one engine beside its index."""

    engine: Engine
    spec: EngineSpec | None = None
    facts: EngineFacts | None = None
    alive_at: float = 0.0
    down_since: float | None = None
    forgotten: bool = False
    status: tuple[object, ...] = ()  # what of the engine's state its view shows


@dataclass(slots=True)
class _Plans:
    """Matching plans, derived when first asked for."""

    version: tuple[int, int] = (-1, -1)
    by_model: dict[str, dict[str, Plan]] = field(default_factory=dict)
    unknown: dict[str, tuple[EngineId, ...]] = field(default_factory=dict)


class KvIndex:
    """Not thread-safe: one event loop owns it. `now` is in seconds since the epoch throughout."""

    def __init__(self, rules: Rules | None = None, *, on_finding: Callable[[EngineId | None, Finding], None]) -> None:
        self.rules = rules or Rules()
        self.residency = Residency()
        self.refused: Counter[str] = Counter()
        """Messages not taken, by reason: frames, message, payload, claim, too-many-engines."""
        self._on_finding = on_finding
        self._known: dict[EngineId, _Known] = {}
        self._specs: dict[str, EngineSpec] = {}
        self._claims = Claims(lease_s=self.rules.engine_lease_s)
        self._fleet = Fleet()
        self._fleet_version = 0
        self._fleet_stale = True
        self._plans = _Plans()

    # -- the write path ------------------------------------------------------------------------------------------------

    def on_frames(
        self, frames: Sequence[bytes], now: float, *, peer: str | None, dialled: EngineId | None, port_rank: int
    ) -> list[Command]:
        """One message off the network, whatever it holds. `peer`: who sent it, if it was listened for."""
        try:
            topic_frame, seq_frame, payload = frames
            seq = decode_seq(seq_frame)
        except ValueError as error:
            return self._refuse("frames", dialled, f"from {peer or dialled}: not [topic, seq, payload]: {error}")
        try:
            address = dialled.address if dialled else self._claimed(topic_frame, peer or "?", now)
            batch = decode_batch(payload)
        except MalformedBatch as error:
            return self._refuse("payload" if dialled else "message", dialled, f"from {peer or dialled}: {error}")
        if address is None:
            return []
        known = self._take(EngineId(address, port_rank if batch.rank is None else batch.rank), now)
        if known is None:
            return []
        message = Message(seq, xxhash.xxh3_64_intdigest(payload), len(payload), batch)
        return self._commands(known, known.engine.on_message(message, now))

    def _claimed(self, topic_frame: bytes, peer: str, now: float) -> str | None:
        """The address a listened message may speak for, or None if it may not. Raises `MalformedBatch`."""
        topic = decode_topic(topic_frame)
        address = f"{topic.host}:{topic.port or self.rules.engine_port}"
        spec, known = self._specs.get(address), self._known.get(EngineId(address))
        models = known.facts.models if known and known.facts else frozenset()
        dialled = spec is not None and spec.events is not None
        why = self._claims.refusal(address, topic, peer, dialled=dialled, models=models, now=now)
        if why is not None:
            self._refuse("claim", EngineId(address), why)
            return None
        return address

    def _take(self, engine: EngineId, now: float) -> _Known | None:
        known = self._known.get(engine)
        if known is None:
            if len(self._known) >= ENGINES_MAX:
                self._refuse("too-many-engines", None, f"{engine}: {ENGINES_MAX} engines are known already")
                return None
            known = self._add(engine, now)
        known.alive_at = now
        return known

    def on_replayed(self, engine: EngineId, seq: int, payload: bytes, now: float) -> list[Command]:
        known = self._known.get(engine)
        if known is None:
            return []
        try:
            batch = decode_batch(payload)
        except MalformedBatch as error:  # its place in the sequence is taken all the same
            batch = EventBatch(0.0, None, (), (RejectedEvent(Rejection.MALFORMED, str(error)),))
        message = Message(seq, xxhash.xxh3_64_intdigest(payload), len(payload), batch)
        return self._commands(known, known.engine.on_replayed(message, now))

    def on_replay_end(self, engine: EngineId, end: ReplayEnd, now: float) -> list[Command]:
        known = self._known.get(engine)
        return self._commands(known, known.engine.on_replay_end(end, now)) if known else []

    # -- the fleet -----------------------------------------------------------------------------------------------------

    def on_specs(self, specs: Iterable[EngineSpec], now: float) -> list[Command]:
        """The engines that discovery wants. One that is no longer wanted is forgotten, unless it speaks for itself."""
        self._specs = {spec.address: spec for spec in specs}
        commands: list[Command] = []
        for spec in self._specs.values():
            for engine in spec.ids:
                if engine not in self._known and len(self._known) >= ENGINES_MAX:
                    self._refuse("too-many-engines", None, f"{engine}: {ENGINES_MAX} engines are known already")
                    continue
                known = self._known.get(engine) or self._add(engine, now)
                known.spec = spec
                known.engine.stream.can_replay = spec.replay_endpoint(engine.rank) is not None
                commands += self._commands(known, known.engine.on_attached(now))
        for engine, known in list(self._known.items()):
            if engine.address not in self._specs and known.spec is not None:
                self._drop(engine)
        self._fleet_stale = True
        return commands

    def on_facts(self, facts: EngineFacts, now: float) -> list[Command]:
        """What an engine says of itself; for rank 0 it goes for all ranks of the address."""
        commands: list[Command] = []
        for engine, known in list(self._known.items()):
            if engine == facts.id or (facts.id.rank == 0 and engine.address == facts.id.address):
                commands += self._learn(known, facts, now)
        self._fleet_stale = True
        return commands

    def _learn(self, known: _Known, facts: EngineFacts, now: float) -> list[Command]:
        known.facts = facts
        network: list[Network] = []
        if facts.health is Health.READY:
            known.alive_at = now
            if facts.process_start_s is not None:
                network += known.engine.on_process_start(facts.process_start_s, now)
            if known.down_since is not None:
                network += known.engine.on_returned(now)
            known.down_since, known.forgotten = None, False
        elif facts.health is Health.DOWN and known.down_since is None:
            known.down_since = now
        return self._commands(known, network)

    def on_tick(self, now: float) -> list[Command]:
        """About once a second: leases, stalled replays, doubts. The sweep is `residency.sweep`."""
        commands: list[Command] = []
        for engine, known in list(self._known.items()):
            commands += self._commands(known, known.engine.on_tick(now))
            if known.down_since is None and now - known.alive_at > self.rules.engine_lease_s and not self._ready(known):
                known.down_since, self._fleet_stale = now, True
            if known.down_since is not None and now - known.down_since > self.rules.forget_after_s:
                self._forget(engine, known)
        return commands

    def watched(self) -> frozenset[EngineSpec]:
        """Engines to probe: those discovered, and those that have made themselves known."""
        wanted = dict(self._specs)
        for engine in self._known:
            if engine.address not in wanted:
                wanted[engine.address] = EngineSpec(engine.address, f"http://{engine.address}")
        return frozenset(wanted.values())

    # -- the read path -------------------------------------------------------------------------------------------------

    def match(
        self, model: str, prompts: Mapping[str, Sequence[int]], engines: Collection[EngineId] = ()
    ) -> MatchAnswer:
        """`prompts`: profile name -> block keys. Raises `UnknownModel`."""
        plans, unknown = self._plan(model)
        found: list[EngineMatch] = []
        for profile, keys in prompts.items():
            if (plan := plans.get(profile)) is not None:
                found += plan.match(self.residency.masks(keys))
        unasked = tuple(e for profile, plan in plans.items() if profile not in prompts for e in plan.engines)
        unknown += unasked
        if engines:
            wanted = frozenset(engines)
            found = [match for match in found if match.engine in wanted]
            unknown = tuple(engine for engine in unknown if engine in wanted)
        return MatchAnswer(tuple(found), unknown)

    def holders(self, model: str, key: int) -> tuple[Holder, ...]:
        """Raises `UnknownModel`."""
        serving = {view.id for view in self._serving(model)}
        return tuple(holder for holder in self.residency.holders(key) if holder.engine in serving)

    def fleet(self) -> Fleet:
        self._freshen()
        return self._fleet

    @property
    def fleet_is_stale(self) -> bool:
        """Whether `fleet()` would differ from what it last was."""
        return self._fleet_stale

    def engine(self, engine: EngineId) -> Engine | None:
        known = self._known.get(engine)
        return known.engine if known else None

    def engines(self) -> tuple[Engine, ...]:
        return tuple(known.engine for known in self._known.values())

    def _serving(self, model: str) -> tuple[EngineView, ...]:
        serving = self.fleet().serving(model)
        if not serving and not any(view.serves(model) for view in self._fleet.engines.values()):
            raise UnknownModel(model)
        return serving

    def _plan(self, model: str) -> tuple[dict[str, Plan], tuple[EngineId, ...]]:
        self._freshen()
        version = (self.residency.version, self._fleet_version)
        if self._plans.version != version or len(self._plans.by_model) > 256:
            self._plans = _Plans(version)
        if model not in self._plans.by_model:
            by_profile: dict[str, list[EngineView]] = {}
            unknown: list[EngineId] = []
            for view in self._serving(model):
                heard = self._known[view.id].engine.stream.last is not None or view.sync is Sync.EXACT
                if view.profile is None or not heard:
                    unknown.append(view.id)
                else:
                    by_profile.setdefault(view.profile, []).append(view)
            self._plans.by_model[model] = {
                profile: Plan([self._known[view.id].engine.groups() for view in views])
                for profile, views in by_profile.items()
            }
            self._plans.unknown[model] = tuple(unknown)
        return self._plans.by_model[model], self._plans.unknown[model]

    # -- within --------------------------------------------------------------------------------------------------------

    def _add(self, engine: EngineId, now: float) -> _Known:
        spec = self._specs.get(engine.address)
        made = Engine(
            engine,
            self.residency,
            Stream(can_replay=bool(spec and spec.replay_endpoint(engine.rank)), limits=self.rules.limits),
            Naming(
                self.rules.expected,
                may_reproduce=self.rules.may_reproduce,
                adapters=lambda: self._adapters(engine),
                others=self._verified_profiles,
            ),
            bounds=self.rules.bounds,
            reannounces=bool(spec and spec.reannounces),
            drop_last_blocks=spec.speculative_drop_blocks if spec else 0,
        )
        known = self._known[engine] = _Known(made, spec, alive_at=now)
        sibling = self._known.get(EngineId(engine.address))
        if sibling is not None and sibling.facts is not None:
            known.facts = sibling.facts
        self._fleet_stale = True
        return known

    def _drop(self, engine: EngineId) -> None:
        self._known.pop(engine).engine.forget()
        self._fleet_stale = True

    def _forget(self, engine: EngineId, known: _Known) -> None:
        """Dead for long: its blocks go; its name too, unless discovery still wants it."""
        if engine.address not in self._specs:
            self._drop(engine)
        elif not known.forgotten:
            known.engine.forget()
            replacement = self._add(engine, now=known.alive_at)
            replacement.facts, replacement.down_since, replacement.forgotten = known.facts, known.down_since, True

    def _adapters(self, engine: EngineId) -> tuple[Adapter, ...]:
        known = self._known.get(engine)
        return known.facts.adapters if known and known.facts else ()

    def _verified_profiles(self) -> list[HashProfile]:
        namings = [known.engine.naming for known in self._known.values()]
        return list(dict.fromkeys(n.profile for n in namings if n.verified and n.profile is not None))

    def _commands(self, known: _Known, network: Iterable[Network]) -> list[Command]:
        engine, commands = known.engine, list[Command]()
        for request in network:
            match request:
                case RequestReplay(first_seq, delay_s):
                    endpoint = known.spec.replay_endpoint(engine.id.rank) if known.spec else None
                    if endpoint is not None:
                        commands.append(Replay(engine.id, endpoint, first_seq, delay_s))
                case CancelReplay():
                    commands.append(StopReplay(engine.id))
        for finding in engine.take_findings():
            self._on_finding(engine.id, finding)
        status = (engine.sync, engine.inexact_reason, engine.naming.profile, engine.naming.verified)
        if status != known.status:
            known.status, self._fleet_stale = status, True
        return commands

    def _refuse(self, reason: str, engine: EngineId | None, text: str) -> list[Command]:
        self.refused[reason] += 1
        self._on_finding(engine, Finding(f"refused-{reason}", text))
        return []

    @staticmethod
    def _ready(known: _Known) -> bool:
        return known.facts is not None and known.facts.health is Health.READY

    def _freshen(self) -> None:
        """The fleet as it is now."""
        if self._fleet_stale:
            self._fleet = Fleet.of(self._view(engine, known) for engine, known in self._known.items())
            self._fleet_stale = False
            self._fleet_version += 1

    def _view(self, engine: EngineId, known: _Known) -> EngineView:
        facts, naming = known.facts or EngineFacts(engine), known.engine.naming
        return EngineView(
            id=engine,
            url=known.spec.url if known.spec else f"http://{engine.address}",
            models=facts.models,
            adapters=facts.adapters,
            root=facts.root,
            health=Health.DOWN if known.down_since is not None else facts.health,
            load=facts.load,
            profile=profile.name if (profile := naming.profile or self._default_profile()) else None,
            profile_verified=naming.verified,
            block_size=naming.block_size or self.rules.expected.block_size,
            sync=known.engine.sync,
            inexact_reason=known.engine.inexact_reason,
            max_model_len=facts.max_model_len,
        )

    def _default_profile(self) -> HashProfile | None:
        """What a router may assume of an engine that has stored nothing yet."""
        size = self.rules.expected.block_size
        return next(iter(self.rules.expected.profiles(size)), None) if size else None
