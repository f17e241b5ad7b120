"""Causes of wrong predictions, and when repetitions become findings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvatlas_common.words import EngineId
from kvatlas_indexer.core import differences
from kvatlas_indexer.core.differences import REPEATED, Cause, Comparison, Repetitions, cause_of

B = 16
ENGINE, OTHER = EngineId("10.0.0.1:8000"), EngineId("10.0.0.2:8000")


def compared(predicted: int, actual: int, *, known: int | None = None, **also: object) -> Comparison:
    """In blocks; an exact engine with nothing else going on."""
    quiet = Comparison(
        ENGINE,
        predicted * B,
        (predicted if known is None else known) * B,
        actual * B,
        B,
        exact=True,
        reset=False,
        neighbours=False,
        tiered=False,
        dropped=0,
    )
    return replace(quiet, **also)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (compared(4, 4), None),
        (compared(4, 2), Cause.UNEXPLAINED),
        (compared(4, 0), Cause.UNEXPLAINED),
        (compared(2, 4), Cause.UNEXPLAINED),
        (compared(4, 3), Cause.SPECULATIVE),
        (compared(4, 3, dropped=1), Cause.UNEXPLAINED),
        (compared(4, 5, dropped=1), Cause.SPECULATIVE),
        (compared(4, 7, dropped=1), Cause.UNEXPLAINED),
        (compared(2, 4, tiered=True), Cause.CONNECTOR),
        (compared(4, 2, tiered=True), Cause.UNEXPLAINED),
        (compared(4, 2, neighbours=True), Cause.RACE),
        (compared(4, 3, neighbours=True), Cause.RACE),
        (compared(2, 4, known=4), Cause.RACE),
        (compared(4, 0, reset=True, neighbours=True), Cause.RESET),
        (compared(4, 0, reset=True, exact=False), Cause.RESET),
        (compared(4, 3, exact=False, neighbours=True), Cause.INEXACT),
        (compared(4, 4, exact=False, neighbours=True), None),
    ],
)
def test_the_first_cause_that_fits(found: Comparison, cause: Cause | None) -> None:
    assert cause_of(found) is cause


def codes(*seen: Comparison) -> list[str]:
    repetitions = Repetitions()
    return [finding.code for one in seen if (finding := repetitions.add(one)) is not None]


@pytest.mark.parametrize(
    ("one", "code", "text"),
    [
        (compared(4, 0), "zero-hits", "load balancer"),
        (compared(4, 0, exact=False, neighbours=True), "zero-hits", "under its name"),
        (compared(0, 4), "unpredicted-hits", "chat template"),
        (compared(4, 3), "one-block-short", "set speculative_drop_blocks to 1"),
        (compared(4, 5, dropped=1), "one-block-short", "check speculative_drop_blocks"),
    ],
)
def test_the_same_again_and_again_is_a_finding_that_names_likely_causes(one: Comparison, code: str, text: str) -> None:
    assert codes(*[one] * (REPEATED - 1)) == []
    assert codes(*[one] * (REPEATED + 1)) == [code] * 2
    repetitions = Repetitions()
    (finding,) = [found for _ in range(REPEATED) if (found := repetitions.add(one))]
    assert text in finding.text


@pytest.mark.parametrize(
    ("one", "but"),
    [
        (compared(4, 0), compared(4, 2)),
        (compared(0, 4), compared(3, 4)),
        (compared(4, 3), compared(4, 4)),
    ],
)
def test_what_happens_now_and_then_is_none(one: Comparison, but: Comparison) -> None:
    assert codes(*[*[one] * (REPEATED - 1), but] * 3) == []


@pytest.mark.parametrize(
    "one",
    [
        compared(4, 0, reset=True),
        compared(0, 0),
        compared(0, 4, exact=False),
        compared(0, 4, known=4),
        compared(4, 3, exact=False),
    ],
)
def test_what_has_a_reason_is_none(one: Comparison) -> None:
    assert codes(*[one] * (2 * REPEATED)) == []


def test_engines_are_counted_each_for_itself() -> None:
    here, there = compared(4, 0), compared(4, 0, engine=OTHER)
    assert codes(*[here, there] * (REPEATED - 1)) == []
    assert codes(*[here, there] * REPEATED) == ["zero-hits"] * 2


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "ENGINES_MAX", 1)
    here, there = compared(4, 0), compared(4, 0, engine=OTHER)
    assert codes(*[here] * (REPEATED - 1), there, here) == []
