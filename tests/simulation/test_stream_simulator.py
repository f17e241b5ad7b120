"""A seeded world of engines and a bad network, and the real index in it.

Engines store, remove, clear and restart, publish what they do, and remember some of it for replay. The network drops,
duplicates, delays and so reorders messages, and cuts, refuses or stalls replays. Then the faults end. At all times

- an engine said to be exact holds what the index says, as of the last message the index has applied;
- nothing is forgotten but what was removed, cleared, restarted or has been in doubt for its time;

and in the end, engines that remember enough are exact, and the index equals their caches.

`KVATLAS_SIMULATOR_SEEDS=5000` runs more; a failure names its seed, `KVATLAS_SIMULATOR_SEED=17` runs that one alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import xxhash

from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.types import AllBlocksCleared
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.effects import BeginEpoch, Effect, Message, ReplayEnd
from kvatlas_indexer.core.engine import Bounds, Engine
from kvatlas_indexer.core.index import Command, KvIndex, Replay, Rules, StopReplay
from kvatlas_indexer.core.stream import Limits, Stream

PARTS = 4  # of the seeds, so that several processes may share them
STEP_S = 0.25
FAULTY_STEPS, QUIET_STEPS = 100, 80
START = 1_700_000_000.0
MODEL = "sim"
Table = Counter[tuple[int, Medium, int]]
KINDS = {0: ("full_attention", None), 1: ("sliding_window", 32)}


@dataclass
class ModelEngine:
    """One rank of an engine: a cache, a publisher, and its memory of what it published."""

    id: EngineId
    rng: random.Random
    groups: int
    tiered: bool
    remembered: int  # batches kept for replay; 0: it has no replay endpoint
    dialled: bool
    started_at: float = START - 100
    lives: list[float] = field(default_factory=lambda: [START - 100])
    seq: int = 0
    down_until: float | None = None
    table: Table = field(default_factory=Counter)
    memory: deque[tuple[int, bytes]] = field(default_factory=deque)
    states: dict[int, dict[tuple[int, Medium, int], int]] = field(default_factory=dict)  # by digest of the message
    unheard: int = 0  # so many messages of this life nobody hears: the connection is slow to come back
    forgot: bool = False  # in this life, what it published no longer fits in its memory
    cleared: bool = False

    def publish(self, now: float, *events: dict[str, object]) -> tuple[int, bytes]:
        payload = msgspec.msgpack.encode([now, list(events), self.id.rank])
        message = (self.seq, payload)
        self.seq += 1
        self.memory.append(message)
        while len(self.memory) > self.remembered:
            self.memory.popleft()
            self.forgot = True
        self.states[xxhash.xxh3_64_intdigest(payload)] = dict(self.table)
        return message

    def step(self, now: float) -> tuple[int, bytes]:
        """Does something and publishes it."""
        if self.rng.random() < 0.02:
            self.table = Counter({at: n for at, n in self.table.items() if at[1] is not Medium.GPU})
            self.cleared = True
            return self.publish(now, {"type": "AllBlocksCleared"})
        events: list[dict[str, object]] = []
        for _ in range(self.rng.randint(1, 3)):
            group = self.rng.randrange(self.groups)
            medium = Medium.CPU if self.tiered and self.rng.random() < 0.3 else Medium.GPU
            where: dict[str, object] = {"medium": medium.upper(), "group_idx": group}
            held = [key for at_group, at, key in self.table if (at_group, at) == (group, medium)]
            if held and self.rng.random() < 0.45:
                gone = self.rng.sample(held, self.rng.randint(1, min(3, len(held))))
                for key in gone:
                    self.table[group, medium, key] -= 1
                    if not self.table[group, medium, key]:
                        del self.table[group, medium, key]
                events.append({"type": "BlockRemoved", "block_hashes": gone, **where})
                continue
            new = [self.rng.randrange(40) for _ in range(self.rng.randint(1, 4))]
            self.table.update((group, medium, key) for key in new)
            kind, window = KINDS[group]
            stored = {"type": "BlockStored", "block_hashes": new, "parent_block_hash": 7, "token_ids": [], **where}
            said = {"block_size": 16, "kv_cache_spec_kind": kind, "kv_cache_spec_sliding_window": window}
            events.append(stored | said)
        return self.publish(now, *events)

    def life_at(self, published_at: float) -> float:
        """The start of the life a message is from."""
        return max(start for start in self.lives if start < published_at)

    def restart(self, now: float, *, after_s: float) -> None:
        self.unheard = self.rng.choice([0, self.rng.randrange(4), self.seq, self.seq + self.rng.randrange(4)])
        self.seq, self.table, self.started_at, self.down_until = 0, Counter(), now + after_s, now + after_s
        self.lives.append(self.started_at)
        self.memory.clear()
        self.forgot = self.cleared = False

    def is_up(self, now: float) -> bool:
        return self.down_until is None or now > self.down_until + 2 * STEP_S


@dataclass
class Exchange:
    """One replay under way, as the network lets it through."""

    engine: ModelEngine
    first_seq: int
    begins_at: float
    ends: ReplayEnd | None  # None: it stalls
    brings: int  # messages before it ends
    answer: deque[tuple[int, bytes]] | None = None
    life: float = 0.0


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = START
        self.faulty = True
        self.wire: list[tuple[float, int, ModelEngine, tuple[int, bytes]]] = []
        self.order = 0
        self.replays: dict[EngineId, Exchange] = {}
        self.engines: dict[EngineId, ModelEngine] = {}
        self.lives: dict[EngineId, set[float]] = {}  # lives that what the index has applied is from
        self.findings: list[str] = []
        limits = Limits(
            held_back_max=self.rng.choice([6, 1000]), replay_stall_s=1.0, rebuild_interval_s=1.0,
            rebuild_interval_max_s=4.0, digests_kept=self.rng.choice([4, 64]),
        )  # fmt: skip
        self.tells_start = self.rng.random() < 0.7
        self.doubt_ttl_s = self.rng.choice([8.0, 1000.0])
        rules = Rules(limits=limits, bounds=Bounds(doubt_ttl_s=self.doubt_ttl_s), engine_lease_s=3600.0)
        self.index = KvIndex(rules, on_finding=lambda engine, finding: self.findings.append(finding.text))
        specs = [self._new_address(number) for number in range(self.rng.randint(1, 3))]
        self.do(self.index.on_specs(specs, self.now))
        for engine in self.engines.values():
            self._note_lives(engine)
            self.tell_facts(engine)

    def _note_lives(self, engine: ModelEngine) -> None:
        """Messages of two lives may happen to have numbers in a row: then there is no gap, nor any other sign.

        Until the process start tells, the index takes them for one life, and is wrong. There is no such excuse for
        what was replayed.
        """
        stream, apply, lives = self.stream(engine), self.stream(engine)._apply, self.lives.setdefault(engine.id, set())
        begin_epoch, replayed = stream._begin_epoch, set[float]()

        def noting_apply(message: Message) -> list[Effect]:
            life = engine.life_at(message.ts)
            if message.seq == 0 or AllBlocksCleared() in message.batch.events:
                lives.clear()
                replayed.clear()
            if stream.replaying and lives and life not in lives:
                replayed.add(life)
            if life not in replayed:
                lives.add(life)
            return apply(message)

        def noting_begin_epoch(reason: str) -> BeginEpoch:
            lives.clear()
            replayed.clear()
            return begin_epoch(reason)

        stream._apply, stream._begin_epoch = noting_apply, noting_begin_epoch  # type: ignore[method-assign]

    def is_fooled(self, engine: ModelEngine) -> bool:
        return len(self.lives[engine.id]) > 1

    def _new_address(self, number: int) -> EngineSpec:
        rng, address = self.rng, f"10.0.0.{number}:8000"
        ranks, remembered, dialled = rng.choice([1, 1, 2]), rng.choice([0, 8, 100_000, 100_000]), rng.random() < 0.5
        groups, tiered = rng.choice([1, 2]), rng.random() < 0.25
        spec = EngineSpec(
            address, f"http://{address}", events="tcp://sim:1" if dialled else None,
            replay="tcp://sim:10" if remembered else None, ranks=ranks,
        )  # fmt: skip
        for engine in spec.ids:
            own = random.Random(rng.random())
            self.engines[engine] = ModelEngine(engine, own, groups, tiered, remembered, dialled)
        return spec

    # -- what the index asks for ---------------------------------------------------------------------------------------

    def do(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self.replays.pop(command.engine, None)
            if isinstance(command, StopReplay):
                continue
            assert isinstance(command, Replay)
            end: ReplayEnd | None = ReplayEnd.COMPLETE
            brings = 1_000_000
            if self.faulty and self.rng.random() < 0.4:
                end = self.rng.choice([ReplayEnd.REFUSED, ReplayEnd.TRUNCATED, None])
                brings = 0 if end is ReplayEnd.REFUSED else self.rng.randint(0, 6)
            begins_at = self.now + command.delay_s + (self.rng.random() if self.faulty else 0.0)
            self.replays[command.engine] = Exchange(
                self.engines[command.engine], command.first_seq, begins_at, end, brings
            )

    def go_on_with(self, exchange: Exchange) -> None:
        """Brings some more of a replay. It ends, cut short, when the engine that answers restarts."""
        engine = exchange.engine
        if self.now < exchange.begins_at or not engine.is_up(self.now):
            return
        if exchange.answer is None:
            exchange.answer = deque(m for m in engine.memory if m[0] >= exchange.first_seq)
            exchange.life = engine.started_at
        for _ in range(self.rng.randint(1, 8) if self.faulty else 1_000_000):
            if self.replays.get(engine.id) is not exchange:
                return
            if exchange.life != engine.started_at:
                return self.end(exchange, ReplayEnd.TRUNCATED)
            if exchange.brings == 0:
                return self.end(exchange, exchange.ends) if exchange.ends is not None else None
            if not exchange.answer:
                return self.end(exchange, ReplayEnd.COMPLETE)
            seq, payload = exchange.answer.popleft()
            exchange.brings -= 1
            self.do(self.index.on_replayed(engine.id, seq, payload, self.now))

    def end(self, exchange: Exchange, end: ReplayEnd) -> None:
        del self.replays[exchange.engine.id]
        self.do(self.index.on_replay_end(exchange.engine.id, end, self.now))

    # -- what happens --------------------------------------------------------------------------------------------------

    def send(self, engine: ModelEngine, message: tuple[int, bytes]) -> None:
        rng, delay = self.rng, 0.0
        if self.faulty:
            if rng.random() < 0.12:
                return
            delay = rng.random() * 1.5 if rng.random() < 0.15 else 0.0
            if rng.random() < 0.08:
                self._put(engine, message, rng.random() * 3)
        self._put(engine, message, delay)

    def _put(self, engine: ModelEngine, message: tuple[int, bytes], delay: float) -> None:
        self.order += 1
        self.wire.append((self.now + delay, self.order, engine, message))

    def deliver(self) -> None:
        due = sorted(item for item in self.wire if item[0] <= self.now)
        self.wire = [item for item in self.wire if item[0] > self.now]
        for _, _, engine, (seq, payload) in due:
            frames = [f"kv@{engine.id.address}@{MODEL}".encode(), seq.to_bytes(8, "big"), payload]
            dialled, peer = (engine.id, None) if engine.dialled else (None, "10.9.9.9")
            self.do(self.index.on_frames(frames, self.now, peer=peer, dialled=dialled, port_rank=engine.id.rank))

    def index_of(self, engine: ModelEngine) -> Engine:
        known = self.index.engine(engine.id)
        assert known is not None
        return known

    def stream(self, engine: ModelEngine) -> Stream:
        return self.index_of(engine).stream

    def tell_facts(self, engine: ModelEngine) -> None:
        health = Health.READY if engine.is_up(self.now) else Health.DOWN
        started = engine.started_at if health is Health.READY and self.tells_start else None
        for rank in self.engines.values():  # ranks of an address restart together
            if rank.id.address == engine.id.address and rank.id.rank == 0:
                facts = EngineFacts(rank.id, health, frozenset({MODEL}), process_start_s=started)
                self.do(self.index.on_facts(facts, self.now))

    def step(self) -> None:
        self.now += STEP_S
        for engine in self.engines.values():
            if not engine.is_up(self.now):
                continue
            while engine.seq < engine.unheard:
                engine.step(self.now - STEP_S + engine.seq / 1000)
            for n in range(engine.rng.choice([0, 0, 1, 2])):
                self.send(engine, engine.step(self.now + n / 100))
            if self.faulty and engine.id.rank == 0 and self.rng.random() < 0.02:
                self.restart(engine)
        self.deliver()
        for exchange in list(self.replays.values()):
            if self.replays.get(exchange.engine.id) is exchange:
                self.go_on_with(exchange)
        if self.rng.random() < (0.2 if self.faulty else 1.0):
            for engine in self.engines.values():
                self.tell_facts(engine)
        self.do(self.index.on_tick(self.now))
        while self.index.residency.sweep():
            pass

    def restart(self, engine: ModelEngine) -> None:
        after_s = 2.0 + 2 * self.rng.random()
        for rank in self.engines.values():
            if rank.id.address == engine.id.address:
                rank.restart(self.now, after_s=after_s)


class Checks:
    """What must hold in a world at all times, and in the end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before: dict[EngineId, tuple[set[tuple[int, Medium, int]], Counter[str]]] = {}

    def at_all_times(self) -> None:
        """Of all of them now and then: to look at what an engine holds is to walk the index."""
        for engine in self._world.engines.values():
            if self._world.rng.random() < 0.5:
                continue
            table = self._world.index.residency.table(engine.id)
            self._exact_is_equal(engine, table)
            self._nothing_is_forgotten(engine, set(table), self._world.index_of(engine).counts)

    def _exact_is_equal(self, engine: ModelEngine, table: dict[tuple[int, Medium, int], int]) -> None:
        known = self._world.index_of(engine)
        if known.sync is not Sync.EXACT or self._world.is_fooled(engine):
            return
        last = known.stream.last_message
        held = dict(engine.states[last[2]]) if last else {}
        if not known.tiered:  # nobody can tell that there is a tier which has not been heard of
            held = {at: n for at, n in held.items() if at[1] is Medium.GPU}
        assert table == held, f"{engine.id} is said to be exact, and differs"

    def _nothing_is_forgotten(
        self, engine: ModelEngine, held: set[tuple[int, Medium, int]], counts: Counter[str]
    ) -> None:
        before, then = self._before.get(engine.id, (set(), counts))
        self._before[engine.id] = held, Counter(counts)
        lost, removed = before - held, counts["removed"] - then["removed"]
        excused = counts["restart"] != then["restart"] or counts["cleared"] != then["cleared"] or engine.remembered
        if not excused and self._world.now - START < self._world.doubt_ttl_s:
            assert len(lost) <= removed, f"{engine.id} forgot {lost}, and {removed} blocks were removed"

    def in_the_end(self) -> None:
        for engine in self._world.engines.values():
            known = self._world.index_of(engine)
            table = self._world.index.residency.table(engine.id)
            fooled = self._world.is_fooled(engine)
            assert not (fooled and self._world.tells_start), f"{engine.id} has restarted, and that was told"
            enough = engine.remembered and not engine.forgot and not fooled
            if enough and not (engine.tiered and engine.cleared):
                assert known.sync is Sync.EXACT, f"{engine.id} is {known.sync}: {known.inexact_reason}"
                assert table == dict(engine.table), f"{engine.id} differs"
            elif known.sync is Sync.EXACT:
                self._exact_is_equal(engine, table)
            else:
                assert known.sync is Sync.INEXACT
                assert known.inexact_reason


def run(seed: int) -> World:
    world = World(seed)
    checks = Checks(world)
    for step in range(FAULTY_STEPS + QUIET_STEPS):
        world.faulty = step < FAULTY_STEPS
        world.step()
        checks.at_all_times()
    world.now += STEP_S
    for engine in world.engines.values():  # what was lost last shows only when another message follows
        world.send(engine, engine.step(world.now))
    world.deliver()
    for _ in range(8):
        world.step()
    checks.at_all_times()
    checks.in_the_end()
    return world


def seeds() -> Sequence[int]:
    if one := os.environ.get("KVATLAS_SIMULATOR_SEED"):
        return [int(one)]
    return range(int(os.environ.get("KVATLAS_SIMULATOR_SEEDS", "120")))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_bad_network_misleads_nobody(part: int) -> None:
    seen: Counter[Sync] = Counter()
    mine = seeds()[part::PARTS]
    for seed in mine:
        try:
            world = run(seed)
        except Exception as error:
            pytest.fail(f"KVATLAS_SIMULATOR_SEED={seed}: {error!r}")
        seen.update(engine.sync for engine in world.index.engines())
    if len(mine) > 10:
        assert seen[Sync.EXACT] > seen[Sync.INEXACT] > 0  # the worlds are neither too kind nor too cruel
