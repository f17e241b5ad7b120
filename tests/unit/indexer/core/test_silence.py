"""An engine that computes and is not heard, told from an idle one, and from one whose figures come late."""

from __future__ import annotations

from kvatlas_common.engines.facts import Work
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.silence import SETTLING_S, SILENT_BLOCKS, SILENT_S, Silence, Silent

E = EngineId("a:1")
SIZE = 16
ENOUGH = SILENT_BLOCKS * SIZE


def test_one_that_was_never_heard_is_silent_when_it_has_computed_enough() -> None:
    silence = Silence()
    silence.worked(E, Work(1000), None, 0)
    silence.worked(E, Work(1000 + ENOUGH - 1), None, 1)
    assert silence.of(E, None, SIZE, SILENT_S) is None
    silence.worked(E, Work(1000 + ENOUGH), None, 1)
    assert silence.of(E, None, SIZE, SILENT_S - 0.1) is None
    assert silence.of(E, None, SIZE, SILENT_S) == Silent(ENOUGH, SILENT_S)


def test_idle_engines_and_those_that_do_not_say_are_not_silent() -> None:
    silence = Silence()
    silence.worked(E, Work(1000), None, 0)
    silence.worked(E, Work(1000), None, 100)
    assert silence.of(E, None, SIZE, 200) is None
    silence.worked(E, Work(), None, 300)
    assert silence.of(E, None, SIZE, 400) is None
    assert silence.of(EngineId("b:1"), None, SIZE, 0) is None


def test_figures_that_were_asked_for_before_the_event_are_no_evidence() -> None:
    silence, heard_at = Silence(), 10.0
    silence.worked(E, Work(0), heard_at, 10.1)
    silence.worked(E, Work(ENOUGH), heard_at, heard_at + SETTLING_S - 0.1)
    assert silence.of(E, heard_at, SIZE, 100) is None
    silence.worked(E, Work(2 * ENOUGH), heard_at, heard_at + SETTLING_S)
    assert silence.of(E, heard_at, SIZE, 100) is not None
    silence.worked(E, Work(2 * ENOUGH), 100.0, 101)
    assert silence.of(E, 100.0, SIZE, 200) is None, "it has been heard since"


def test_prompts_shorter_than_a_block_are_never_stored() -> None:
    silence = Silence()
    silence.worked(E, Work(0, 0), None, 0)
    silence.worked(E, Work(1000, 100), None, 1)
    assert silence.of(E, None, SIZE, 10) is None
    silence.worked(E, Work(5000, 100), None, 1)
    assert silence.of(E, None, SIZE, 10) is not None


def test_a_new_life_counts_from_nothing() -> None:
    silence = Silence()
    silence.worked(E, Work(1000), None, 0)
    silence.worked(E, Work(10), None, 1)
    silence.worked(E, Work(20), None, 2)
    assert silence.of(E, None, SIZE, 10) is None
    silence.keep_only(set())
    assert silence.of(E, None, SIZE, 10) is None
