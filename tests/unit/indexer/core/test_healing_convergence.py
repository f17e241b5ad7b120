"""An indexer that joins an engine already warm, with no replay left, learns from traffic what the engine holds.

The engine is the scheduler and block pool of the simulated one, with real event bytes in between: requests overlap,
blocks are evicted all the time, and events may come late or not at all. Without healing the same run is the control.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import Algorithm, HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.observations import Finished, Outcome, Routed
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.healing import Healed, Healing
from kvatlas_indexer.core.index import KvIndex, Rules
from kvatlas_indexer.core.naming import Expected
from kvatlas_loadtest.events import EventEncoder, WireVersion
from kvatlas_loadtest.hashing import PromptChain
from kvatlas_loadtest.kv_events import KvEvent
from kvatlas_loadtest.scheduler import EngineCore, EngineLimits, EngineRequest
from tests.unit.indexer.core.published import profile

ENGINE = EngineId("10.0.0.1:8000")
BLOCK = 16
USED: HashProfile = profile(Algorithm.SHA256_CBOR, block_size=BLOCK)
WARM_STEPS = 1200
WINDOW = 50  # requests
SEEDS = pytest.mark.parametrize("seed", range(2))


@dataclass(frozen=True)
class Case:
    blocks: int
    contexts: int
    lag: int = 0  # messages always under way
    lost: float = 0.0  # share of messages that never come
    at_once: int = 4  # requests


class World:
    """A workload, one engine, and an index that begins to listen when told to."""

    def __init__(self, case: Case, *, heals: bool, seed: int = 0) -> None:
        self.case = case
        self.core = EngineCore(EngineLimits(num_blocks=case.blocks, block_size=BLOCK, max_num_batched_tokens=512))
        self.index = KvIndex(Rules(Expected(USED.algorithm, USED.seed, BLOCK)), on_finding=lambda engine, finding: None)
        self.healing = Healing(self.index, on_finding=lambda engine, finding: None) if heals else None
        self.now = 1000.0
        self.index.on_specs([EngineSpec(ENGINE.address, f"http://{ENGINE.address}", events="tcp://e:1")], self.now)
        self.index.on_facts(EngineFacts(ENGINE, Health.READY, frozenset({"m"})), self.now)
        self.listening = False
        self.compared: list[tuple[int, int]] = []  # predicted, actual
        self._encoder = EventEncoder(WireVersion.V0_32, BLOCK)
        self._chance = random.Random(seed)
        self._fate = random.Random(seed + 1)  # of messages: the workload is the same whatever is lost
        self._wire: deque[tuple[int, bytes]] = deque()
        self._seq = self._requests = 0
        self._under_way: dict[str, tuple[int, bool]] = {}
        self._contexts = [self._tokens(60, 200) for _ in range(case.contexts)]

    def _tokens(self, fewest: int, most: int) -> list[int]:
        return [self._chance.randrange(1000) for _ in range(self._chance.randrange(fewest, most))]

    def shares(self, windows: int) -> list[float]:
        """Per so many requests, the share of their cached tokens that had been predicted."""
        found = []
        for _ in range(windows):
            end = len(self.compared) + WINDOW
            while len(self.compared) < end:
                self.step()
            latest = self.compared[-WINDOW:]
            found.append(sum(min(pair) for pair in latest) / max(1, sum(actual for _, actual in latest)))
        return found

    def step(self) -> None:
        self.now += 0.05
        while len(self._under_way) < self.case.at_once:
            self._ask()
        step = self.core.schedule()
        assert step is not None
        result = self.core.complete(step)
        self._publish(list(result.events))
        self._deliver()
        self.index.on_tick(self.now)
        for sampled in result.sampled:
            if sampled.finish_reason:
                self._end(sampled.request)

    def settle(self) -> None:
        """Everything under way arrives."""
        while self._wire:
            self._receive(*self._wire.popleft())

    def _ask(self) -> None:
        self._requests += 1
        prompt = self._chance.choice(self._contexts) + self._tokens(1, 40)
        name, keys = str(self._requests), prompt_keys(USED, prompt).tolist()[: (len(prompt) - 1) // BLOCK]
        predicted = sum(match.blocks * BLOCK for match in self.index.match("m", {USED.name: keys}).matches)
        self._under_way[name] = predicted, self.listening
        if self.healing and self.listening:
            self.healing.observe(Routed(name, ENGINE, "m", len(prompt), predicted, {USED.name: keys}), self.now)
        answer = self._chance.randrange(1, 30)
        chain = PromptChain(USED, PromptExtras())
        self.core.add(EngineRequest(name, prompt, answer, chain, lambda _: self._chance.randrange(1000)))

    def _end(self, request: EngineRequest) -> None:
        predicted, counts = self._under_way.pop(request.id)
        actual = request.cached_tokens
        assert actual is not None
        if counts:
            self.compared.append((predicted, actual))
            if self.healing:
                self.healing.observe(Finished(request.id, ENGINE, "m", actual, 1, True, Outcome.OK), self.now)

    def _publish(self, events: list[KvEvent]) -> None:
        if events:
            self._wire.append((self._seq, self._encoder.batch(events, self.now)))
            self._seq += 1

    def _deliver(self) -> None:
        while len(self._wire) > self.case.lag:
            self._receive(*self._wire.popleft())

    def _receive(self, seq: int, payload: bytes) -> None:
        if self.listening and self._fate.random() >= self.case.lost:
            frames = [b"kv@e@m", seq.to_bytes(8, "big"), payload]
            self.index.on_frames(frames, self.now, peer=None, dialled=ENGINE, port_rank=0)

    def held(self) -> dict[int, int]:
        return {key: copies for (_, _, key), copies in self.index.residency.table(ENGINE).items()}


def joined(case: Case, seed: int, *, heals: bool) -> World:
    """An index that begins to listen when the engine has been at work for long."""
    world = World(case, heals=heals, seed=seed)
    for _ in range(WARM_STEPS):
        world.step()
    world.settle()
    world.listening = True
    return world


@SEEDS
@pytest.mark.parametrize(
    "case",
    [Case(blocks=400, contexts=30), Case(blocks=400, contexts=30, lag=3), Case(blocks=1000, contexts=40)],
    ids=["on time", "late", "roomy"],
)
def test_traffic_tells_what_a_warm_engine_holds(case: Case, seed: int) -> None:
    world = joined(case, seed, heals=True)
    first, second, *later = world.shares(6)
    assert first < second < 0.99, "it began with nothing"
    assert min(later) > 0.93
    assert later[-1] > 0.97
    assert joined(case, seed, heals=False).shares(5)[-1] < 0.7, "and does not learn it from events alone"
    assert world.index.fleet().engines[ENGINE].sync is Sync.INEXACT


@SEEDS
def test_what_has_been_healed_is_the_engines_own_table(seed: int) -> None:
    world = joined(Case(blocks=400, contexts=30), seed, heals=True)
    world.shares(6)
    assert world.healing is not None
    assert world.healing.healed[Healed.ADDED] > 100
    assert world.held() == world.core.copies()


@SEEDS
def test_an_engine_that_keeps_losing_messages_is_kept_close_to_the_truth(seed: int) -> None:
    world = joined(Case(blocks=300, contexts=20, lag=2, lost=0.1, at_once=8), seed, heals=True)
    assert min(world.shares(7)[-3:]) > 0.9
    predicted, actual = (sum(pair[i] for pair in world.compared[-3 * WINDOW :]) for i in (0, 1))
    assert predicted < 1.05 * actual, "and promises hardly more than there is"


@SEEDS
def test_an_engine_heard_from_the_start_is_not_touched_by_healing(seed: int) -> None:
    """Late events, evictions, overlapping requests: differences, but the index is exact and stays as it is."""
    case = Case(blocks=150, contexts=12, lag=3, at_once=8)
    world, control = (World(case, heals=heals, seed=seed) for heals in (True, False))
    for one in (world, control):
        one.listening = True
        one.shares(4)
    assert world.healing is not None
    assert world.healing.healed == {}
    different = sum(predicted != actual for predicted, actual in world.compared)
    assert different > 0
    assert sum(world.healing.differences.values()) == different
    assert world.compared == control.compared
    world.settle()
    assert world.held() == world.core.copies()
    assert world.index.fleet().engines[ENGINE].sync is Sync.EXACT
