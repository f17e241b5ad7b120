"""What is wrong with engines, by the look of all that is known of them: it appears, lasts, and ends with its cause."""

from __future__ import annotations

from kvatlas_common.blocks.profile import Algorithm
from kvatlas_common.engines.facts import Work
from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.engines.specs import EngineSpec, parse_engine
from kvatlas_common.fleet import Health
from kvatlas_common.observations import Finished, Outcome, Routed
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.commands import Rules
from kvatlas_indexer.core.diagnosis import CONNECTING_S, Diagnosis
from kvatlas_indexer.core.differences import REPEATED, Comparison, Repetitions
from kvatlas_indexer.core.engine import RESTARTS_OVER_S, RESTARTS_SUSPECT
from kvatlas_indexer.core.expected import Expected
from kvatlas_indexer.core.silence import SETTLING_S, SILENT_S
from kvatlas_indexer.core.stream import ReplayEnd
from tests.unit.indexer.core.published import SIZE, profile
from tests.unit.indexer.core.world import E1, E2, LATER, World

UNKNOWABLE = "no one knows it"


def spec(engine: str = E1.address, *, replay: bool = True) -> EngineSpec:
    return parse_engine(f"{engine},events=5557" + (",replay=5558" if replay else ""))


class Looking(World):
    """A world that is looked at."""

    def __init__(self, rules: Rules | None = None) -> None:
        super().__init__(rules)
        self.accuracy, self.repetitions = Accuracy(), Repetitions()
        self.diagnosis = Diagnosis(self.index, self.accuracy, self.repetitions)

    def look(self) -> list[tuple[str, str]]:
        looked = self.diagnosis.look(self.index.fleet(), self.now)
        return [(str(about), str(finding.code)) for found in looked for about, finding in found]

    def well(self, *engines: EngineSpec) -> None:
        """Engines that are ready, connected, heard from their first message, and asked for what was before it."""
        self.wants(*engines)
        for one in engines:
            self.facts(one.id)
            self.index.on_replay_end(one.id, ReplayEnd.COMPLETE, self.now)
            self.store(one.id, LATER)


def test_nothing_is_wrong_with_engines_that_are_well() -> None:
    world = Looking(Rules(expected=Expected(Algorithm.SHA256_CBOR, "42", SIZE)))
    assert world.look() == [("", "no-engines")]
    world.well(spec(), spec(E2.address))
    assert world.look() == []


def test_a_stream_is_connecting_for_a_while_and_then_unreachable() -> None:
    world = Looking()
    world.well(spec())
    world.index.on_connection(E1, False, world.now)
    assert world.look() == []
    world.now += CONNECTING_S
    assert world.look() == [(str(E1), "events-unreachable")]
    world.index.on_connection(E1, True, world.now)
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    assert "events-unreachable" not in [code for _, code in world.look()]


def test_an_engine_that_computes_and_is_not_heard() -> None:
    world = Looking()
    world.wants(spec(replay=False))
    world.facts(E1)
    assert world.look() == [(str(E1), "not-heard-yet"), (str(E1), "replay-absent")]
    for tokens in (0, 100 * SIZE):
        world.diagnosis.silence.worked(E1, Work(tokens), None, world.now)
    world.now += SILENT_S
    assert world.look() == [(str(E1), "no-events"), (str(E1), "replay-absent")]
    world.store(E1, LATER)
    assert world.look() == [(str(E1), "replay-absent")]


def test_a_stream_that_is_cut() -> None:
    world = Looking()
    world.well(spec())
    heard_at = world.now
    world.diagnosis.silence.worked(E1, Work(100), heard_at, world.now)
    world.now += SETTLING_S
    world.diagnosis.silence.worked(E1, Work(100 + 100 * SIZE), heard_at, world.now)
    world.now += SILENT_S
    assert world.look() == [(str(E1), "no-events")]


def test_a_replay_that_fails_is_named_until_one_is_answered() -> None:
    world = Looking()
    world.well(spec())
    world.index.on_connection(E1, False, world.now)
    world.index.on_connection(E1, True, world.now)
    world.index.on_replay_end(E1, ReplayEnd.REFUSED, world.now)
    assert (str(E1), "replay-unreachable") in world.look()
    world.index.on_connection(E1, True, world.now)
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    assert (str(E1), "replay-unreachable") not in world.look()


def test_a_seed_that_nobody_knows_is_held_against_the_others_of_the_model() -> None:
    world = Looking()
    world.well(spec(E2.address))
    world.wants(spec(), spec(E2.address))
    world.facts(E1, cache=CacheConfig(SIZE, 100, "sha256_cbor"))
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    world.store(E1, profile(seed=UNKNOWABLE))
    assert world.look() == [(str(E1), "seed-differs")]


def test_what_metrics_say_of_the_algorithm_tells_it_from_the_seed() -> None:
    world = Looking(Rules(expected=Expected(Algorithm.SHA256_CBOR, "42", SIZE)))
    world.wants(spec())
    world.facts(E1, cache=CacheConfig(2 * SIZE, 100, "builtin"))
    assert world.look()[-2:] == [(str(E1), "algorithm-differs"), (str(E1), "block-size-differs")], "before any event"


def test_an_engine_that_is_down_is_nothing_else() -> None:
    world = Looking(Rules(expected=Expected(Algorithm.SHA256_CBOR, "7", SIZE)))
    world.well(spec(replay=False))
    assert len(world.look()) > 1
    world.facts(E1, Health.DOWN, error="nobody listens there")
    assert world.look() == [(str(E1), "engine-down")]


def test_two_publishers_of_one_name_are_told_until_one_is_gone() -> None:
    world = Looking()
    world.well(spec(replay=False))
    for number in range(RESTARTS_SUSPECT):
        world.store(E1, LATER, [number] * SIZE, seq=0)
    assert (str(E1), "name-claimed-twice") in world.look()
    world.passes(RESTARTS_OVER_S + 1)
    assert world.look() == [(str(E1), "replay-absent"), (str(E1), "inexact")], "what they said may be mixed up"


def test_the_same_difference_again_and_again_lasts_until_another_comes_between() -> None:
    world = Looking()
    world.well(spec())

    def compared(actual: int) -> Comparison:
        facts = {"exact": True, "reset": False, "neighbours": False, "tiered": False, "dropped": 0}
        return Comparison(E1, 4 * SIZE, 4 * SIZE, actual, SIZE, **facts)  # type: ignore[arg-type]

    for _ in range(REPEATED):
        world.repetitions.add(compared(0))
    assert world.look() == [(str(E1), "zero-hits")]
    world.repetitions.add(compared(4 * SIZE))
    assert world.look() == []


def test_answers_without_cached_tokens_cannot_be_compared() -> None:
    world = Looking()
    world.well(spec())

    def answered(number: int, cached: int | None) -> None:
        world.accuracy.observe(Routed(f"r{number}", E1, "m", 100, 64, {}))
        world.accuracy.observe(Finished(f"r{number}", E1, "m", cached, 5, True, Outcome.OK))

    for number in range(REPEATED):
        answered(number, None)
    assert world.look() == [(str(E1), "cached-tokens-unreported")]
    answered(REPEATED, 64)
    assert world.look() == []
