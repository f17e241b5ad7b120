"""The index as a whole: every engine, the residency they share, and what a lookup answers.

Three kinds of things happen to it: frames come in (`on_frames`, `on_replayed`, `on_replay_end`), discovery and probes
say what there is (`on_specs`, `on_facts`), and time passes (`on_tick`). Each returns what the caller must do on the
network; all else is done when it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import xxhash

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.decode import decode_batch, decode_topic
from kvatlas_common.events.types import EventBatch, MalformedBatch, RejectedEvent, Rejection
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import Adapter, EngineView, Fleet, Health
from kvatlas_common.matching import Holder, MatchAnswer, PromptKeys, Prompts
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.claims import Claims, refused
from kvatlas_indexer.core.commands import Command, Replay, Rules, StopReplay
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.effects import CancelReplay, Message, ReplayEnd, RequestReplay
from kvatlas_indexer.core.engine import Engine, Network
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.match import Plan
from kvatlas_indexer.core.naming import Naming
from kvatlas_indexer.core.plans import ModelPlan, Plans
from kvatlas_indexer.core.reading import Reading, read
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.stream import Stream
from kvatlas_indexer.core.views import Views

__all__ = ["Command", "KvIndex", "Replay", "Rules", "StopReplay"]

ENGINES_MAX = 4096
"""Engines known at once. A listened name beyond is refused: names come from the network."""


class KvIndex:
    """Not thread-safe: one event loop owns it. `now` is in seconds since the epoch throughout."""

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        on_finding: Callable[[EngineId | None, Finding], None],
        on_emptied: Callable[[EngineId], None] = lambda engine: None,  # it restarted, or was cleared
    ) -> None:
        self.rules = rules or Rules()
        self.residency = Residency()
        self.refused: Counter[str] = Counter()
        """Messages not taken, by reason: frames, message, payload, claim, too-many-engines."""
        self.delays = Durations()  # from a batch's own time to its being taken up, of all engines
        self._on_finding = on_finding
        self._on_emptied = on_emptied
        self._known: dict[EngineId, Known] = {}
        self._ranks: dict[str, dict[int, Known]] = {}  # the same by address and rank
        self._specs: dict[str, EngineSpec] = {}
        self._claims = Claims(lease_s=self.rules.engine_lease_s)
        self._views = Views(self._view)
        self._heard: dict[EngineId, Known] = {}  # engines whose messages may have changed what their view shows
        self._verified: list[HashProfile] | None = None
        self._plans = Plans()

    # -- the write path ------------------------------------------------------------------------------------------------

    def on_frames(
        self, frames: Sequence[bytes], now: float, *, peer: str | None, dialled: EngineId | None, port_rank: int
    ) -> list[Command]:
        """One message off the network, whatever it holds. `peer`: who sent it, if it was listened for."""
        return self.on_read(read(frames, now), now, peer=peer, dialled=dialled, port_rank=port_rank)

    def on_read(
        self, reading: Reading, now: float, *, peer: str | None, dialled: EngineId | None, port_rank: int
    ) -> list[Command]:
        """The same, with what it says by itself read already."""
        if (message := reading.message) is None:
            reason = "frames" if not reading.framed else "payload" if dialled else "message"
            return self._refuse(reason, dialled, f"from {peer or dialled}: {reading.why}")
        rank = port_rank if message.batch.rank is None else message.batch.rank
        if dialled is not None:
            return self.on_message(dialled if dialled.rank == rank else EngineId(dialled.address, rank), message, now)
        try:
            address = self._claimed(reading.topic, peer or "?", now)
        except MalformedBatch as error:
            return self._refuse("message", None, f"from {peer}: {error}")
        return self.on_message(EngineId(address, rank), message, now, speaks=True) if address is not None else []

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

    def _take(self, engine: EngineId, now: float) -> Known | None:
        known = self._known.get(engine) or self._add(engine, now)
        if known is None:
            return None
        known.alive_at = now
        if known.down_since is not None and (known.facts is None or known.facts.health is not Health.DOWN):
            known.down_since, known.forgotten = None, False  # it was merely silent
            self._views.changed(engine)
        return known

    def on_connection(self, engine: EngineId, up: bool, now: float) -> list[Command]:
        """Whether the publisher of a dialled engine is connected, at every change."""
        known = self._known.get(engine)
        return self._commands(known, known.engine.on_connection(up, now)) if known else []

    def on_message(self, engine: EngineId, message: Message, now: float, *, speaks: bool = False) -> list[Command]:
        """One message, decoded; `speaks`: the engine has made itself known by it."""
        known = self._take(engine, now)
        if known is None:
            return []
        known.speaks = known.speaks or speaks
        network = known.engine.on_message(message, now)
        self._heard[engine] = known  # to be looked into when somebody asks, not after each of many messages
        return self._asked(known, network)

    def on_replayed(self, engine: EngineId, seq: int, payload: bytes, now: float) -> list[Command]:
        try:
            batch = decode_batch(payload)
        except MalformedBatch as error:  # its place in the sequence is taken all the same
            batch = EventBatch(0.0, None, (), (RejectedEvent(Rejection.MALFORMED, str(error)),))
        message = Message(seq, xxhash.xxh3_64_intdigest(payload), len(payload), batch)
        return self.on_replayed_message(engine, message, now)

    def on_replayed_message(self, engine: EngineId, message: Message, now: float) -> list[Command]:
        known = self._known.get(engine)
        return self._commands(known, known.engine.on_replayed(message, now)) if known else []

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
                if engine not in self._known:
                    self._add(engine, now)
            for known in self._ranks.get(spec.address, {}).values():
                commands += self._respecify(known, spec, now)
        for known in [k for k in self._known.values() if k.spec is not None and k.id.address not in self._specs]:
            if known.speaks and now - known.alive_at <= self.rules.engine_lease_s:
                commands += self._respecify(known, None, now)
            else:
                commands += self._drop(known)
        return commands

    def _respecify(self, known: Known, spec: EngineSpec | None, now: float) -> list[Command]:
        known.spec, engine = spec, known.engine
        engine.configure(
            reannounces=bool(spec and spec.reannounces), drop_last_blocks=spec.speculative_drop_blocks if spec else 0
        )
        engine.stream.can_replay = spec is not None and spec.replay_endpoint(known.id.rank) is not None
        if spec is None or spec.events is None:
            engine.connected = True  # as far as can be told of one that connects to us
        self._views.changed(known.id)
        return self._commands(known, engine.on_attached(now))

    def on_facts(self, facts: EngineFacts, now: float) -> list[Command]:
        """What an engine says of itself; for rank 0 it goes for all ranks of the address."""
        ranks = self._ranks.get(facts.id.address, {})
        commands: list[Command] = []
        for rank in ranks if facts.id.rank == 0 else {facts.id.rank} & ranks.keys():
            commands += self._learn(ranks[rank], facts, now)
        return commands

    def _learn(self, known: Known, facts: EngineFacts, now: float) -> list[Command]:
        before, known.facts = known.facts, facts
        if before and before.process_start_s is not None and before.process_start_s != facts.process_start_s:
            self._on_emptied(known.id)  # one that publishes no events says it only here
        self._views.changed(known.id)
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
        """A few times a second: leases, stalled replays, doubts. The sweep is `residency.sweep`."""
        commands: list[Command] = []
        for known in list(self._known.values()):
            commands += self._commands(known, known.engine.on_tick(now))
            if known.down_since is None and now - known.alive_at > self.rules.engine_lease_s and not known.ready:
                known.down_since = now
                self._views.changed(known.id)
            if known.down_since is not None and now - known.down_since > self.rules.forget_after_s:
                commands += self._forget(known)
        return commands

    # -- engines that change hands ------------------------------------------------------------------------------------

    def adopt(self, engine: EngineId, set_up: Callable[[Known], None], now: float) -> None:
        """Takes in an engine another shard has left; `set_up` puts it where its last owner stood."""
        if engine in self._known or (known := self._add(engine, now)) is None:
            return
        set_up(known)
        self._views.changed(engine)

    def on_taken(self, engine: EngineId, now: float) -> list[Command]:
        """It has been set up in full: what it published since its last owner stood there is asked for."""
        known = self._known.get(engine)
        return self._commands(known, known.engine.on_returned(now)) if known else []

    def abandon(self, address: str) -> list[Command]:
        """Another shard owns it now: it is forgotten here."""
        commands: list[Command] = []
        for known in list(self._ranks.get(address, {}).values()):
            commands += self._drop(known)
        return commands

    def known(self) -> tuple[Known, ...]:
        return tuple(self._known.values())

    def watched(self) -> frozenset[EngineSpec]:
        """Engines to probe: those discovered, and those that have made themselves known."""
        wanted = dict(self._specs)
        for address in self._ranks:
            if address not in wanted:
                wanted[address] = EngineSpec(address, f"http://{address}")
        return frozenset(wanted.values())

    # -- the read path -------------------------------------------------------------------------------------------------

    def match(self, model: str, prompts: Prompts, engines: Collection[EngineId] = ()) -> MatchAnswer:
        """`prompts`: profile name -> block keys. Raises `UnknownModel`."""
        plan = self._plan(model)
        found, unknown = list[MatchAnswer](), plan.unknown
        for profile, of_profile in plan.by_profile.items():
            if (keys := prompts.get(profile)) is not None:
                found.append(self._matched(of_profile, keys))
            else:
                unknown += tuple(of_profile.engines)
        return MatchAnswer.joined(found, unknown).among(engines)

    def _matched(self, plan: Plan, keys: PromptKeys) -> MatchAnswer:
        if (bits := plan.simple) is not None:
            return MatchAnswer(plain=plan.matched(self.residency.fall_outs(keys, bits)))
        return plan.match(self.residency.masks(keys) if plan.needs_all else self.residency.leading_masks(keys))

    def holders(self, model: str, key: int) -> tuple[Holder, ...]:
        """Raises `UnknownModel`."""
        self._settle()
        serving = {view.id for view in self._views.serving(model)}
        return tuple(holder for holder in self.residency.holders(key) if holder.engine in serving)

    def fleet(self) -> Fleet:
        self._settle()
        return self._views.fleet()

    @property
    def fleet_is_stale(self) -> bool:
        """Whether `fleet()` may differ from what it last was."""
        self._settle()
        return self._views.stale

    def engine(self, engine: EngineId) -> Engine | None:
        known = self._known.get(engine)
        return known.engine if known else None

    def engines(self) -> tuple[Engine, ...]:
        return tuple(known.engine for known in self._known.values())

    def _plan(self, model: str) -> ModelPlan:
        self._settle()
        self._views.freshen()
        if (plan := self._plans.get(model, (self.residency.version, self._views.version))) is not None:
            return plan
        serving = self._views.serving(model)
        return self._plans.keep(model, ModelPlan.of((self._known[view.id], view) for view in serving))

    # -- within --------------------------------------------------------------------------------------------------------

    def _add(self, engine: EngineId, now: float) -> Known | None:
        """None if there are too many."""
        if len(self._known) >= ENGINES_MAX:
            self._refuse("too-many-engines", None, f"{engine}: {ENGINES_MAX} engines are known already")
            return None
        return self._keep(Known(self._new_engine(engine), self._specs.get(engine.address), alive_at=now))

    def _keep(self, known: Known) -> Known:
        ranks = self._ranks.setdefault(known.id.address, {})
        if known.facts is None and 0 in ranks:
            known.facts = ranks[0].facts
        self._known[known.id] = ranks[known.id.rank] = known
        self._views.changed(known.id)
        return known

    def _new_engine(self, engine: EngineId) -> Engine:
        spec = self._specs.get(engine.address)
        return Engine(
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
            delays=self.delays,
            on_emptied=self._on_emptied,
        )

    def _drop(self, known: Known) -> list[Command]:
        commands: list[Command] = [StopReplay(known.id)] if known.engine.stream.replaying else []
        known.engine.forget()
        del self._known[known.id]
        ranks = self._ranks[known.id.address]
        del ranks[known.id.rank]
        if not ranks:
            del self._ranks[known.id.address]
        self._views.changed(known.id)
        self._verified = None
        return commands

    def _forget(self, known: Known) -> list[Command]:
        """Dead for long: its blocks go; its name too, unless discovery still wants it."""
        if not known.wanted:
            return self._drop(known)
        if known.forgotten:
            return []
        commands = self._drop(known)
        known.engine, known.forgotten, known.status = self._new_engine(known.id), True, ()
        self._keep(known)
        return commands

    def _adapters(self, engine: EngineId) -> tuple[Adapter, ...]:
        known = self._known.get(engine)
        return known.facts.adapters if known and known.facts else ()

    def _verified_profiles(self) -> list[HashProfile]:
        self._settle()
        if self._verified is None:
            namings = [known.engine.naming for known in self._known.values()]
            self._verified = list(dict.fromkeys(n.profile for n in namings if n.verified and n.profile is not None))
        return self._verified

    def _commands(self, known: Known, network: Iterable[Network]) -> list[Command]:
        self._look_into(known)
        return self._asked(known, network)

    def _asked(self, known: Known, network: Iterable[Network]) -> list[Command]:
        engine = known.engine
        commands: list[Command] = []
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
        return commands

    def _settle(self) -> None:
        while self._heard:
            self._look_into(self._heard.popitem()[1])

    def _look_into(self, known: Known) -> None:
        """Whether its state is another one than its view shows."""
        status = known.status_now()
        if status != known.status:
            known.status, self._verified = status, None
            self._views.version += 1
            self._views.changed(known.id)

    def _refuse(self, reason: str, engine: EngineId | None, why: str | Finding) -> list[Command]:
        self.refused[reason] += 1
        self._on_finding(engine, why if isinstance(why, Finding) else refused(reason, why))
        return []

    def _view(self, engine: EngineId) -> EngineView | None:
        known = self._known.get(engine)
        return known.view(self.rules.expected) if known else None
