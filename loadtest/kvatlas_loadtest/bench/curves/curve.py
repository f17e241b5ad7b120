"""A curve: figures against a size, and what it must show, read off its two ends. Pure.

A claim is about growth: from its first size to the last one the figure may grow by no more than so many times. So a
slow machine changes no verdict, and one that gets slower during the curve changes it for the worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

SECTION = "curves"  # of the page they are written to
LIKE_IT = 1.3
"""What is allowed to "grow as the size does" beyond that: noise."""
FLAT = 2.0
"""What is allowed to "not grow with the size"."""


class AsJson(TypedDict):
    """`points`: size, then a figure per column, None where it was not measured."""

    name: str
    title: str
    size: str
    columns: list[dict[str, Any]]
    points: list[tuple[int, list[float | None]]]
    note: str
    readings: list[str]
    holds: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Claim:
    """`grows`: so many times at most per time the size grows (1: with it), or `grows_max` in all; `shows`: what is so
    then. `since`: of sizes from this one on.
    """

    shows: str
    grows: float | None = None
    grows_max: float = FLAT
    since: int = 0

    def allowed(self, size: float) -> float:
        """Growth, where the size grows so many times."""
        return self.grows_max if self.grows is None else max(self.grows * size, 1.0) * LIKE_IT


@dataclass(frozen=True, slots=True)
class Column:
    """`digits` after the point."""

    name: str
    unit: str
    claim: Claim | None = None
    digits: int = 2


@dataclass(slots=True)
class Curve:
    """`size`: what the points differ in. `points`: size -> a figure per column, in order."""

    name: str
    title: str
    size: str
    columns: tuple[Column, ...]
    points: dict[int, tuple[float | None, ...]] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def readings(self) -> list[tuple[str, bool]]:
        """One line per claim, and whether it holds."""
        return [self._reading(n, c, c.claim) for n, c in enumerate(self.columns) if c.claim is not None]

    @property
    def holds(self) -> bool:
        return all(held for _, held in self.readings())

    def _reading(self, number: int, column: Column, claim: Claim) -> tuple[str, bool]:
        measured = [(x, v[number]) for x, v in sorted(self.points.items()) if x >= claim.since]
        ends = [(x, value) for x, value in measured if value is not None]
        if len(ends) < 2 or ends[0][1] <= 0:
            return f"{column.name}: not measured at two sizes", False
        (least, first), (most, last) = ends[0], ends[-1]
        size, growth = most / least, last / first
        held = growth <= claim.allowed(size)
        shows = claim.shows if held else f"NOT: {claim.shows} (at most {_times(claim.allowed(size))} times was allowed)"
        sizes = f"{_times(size)} times the {self.size} ({least:,} to {most:,})"
        return f"{column.name}: {sizes}, {_times(growth)} times the {column.unit}: {shows}", held

    def rows(self) -> list[list[str]]:
        """Cells of a table, its heading first."""
        heading = [self.size, *(f"{column.name}, {column.unit}" for column in self.columns)]
        return [heading] + [
            [f"{x:,}", *(_figure(v, c) for v, c in zip(values, self.columns, strict=True))]
            for x, values in sorted(self.points.items())
        ]

    def as_json(self) -> AsJson:
        return AsJson(
            name=self.name,
            title=self.title,
            size=self.size,
            columns=[{"name": column.name, "unit": column.unit} for column in self.columns],
            points=[(x, list(values)) for x, values in sorted(self.points.items())],
            note=self.note,
            readings=[text for text, _ in self.readings()],
            holds=self.holds,
            seconds=round(self.seconds, 1),
        )


def markdown(curves: Sequence[Curve], facts: str) -> str:
    """The section of `docs/performance.md`. `facts`: what was run, on what."""
    parts = [facts, ""]
    for curve in curves:
        heading, *rows = curve.rows()
        parts += [f"### {curve.title}", ""]
        parts += [curve.note, ""] if curve.note else []
        parts += [_line(heading), _line(["---:"] * len(heading)), *map(_line, rows), ""]
        parts += [*(f"- {text}" for text, _ in curve.readings()), ""]
    return "\n".join(parts)


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def _figure(value: float | None, column: Column) -> str:
    return "-" if value is None else f"{value:,.{column.digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
