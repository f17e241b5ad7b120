"""One figure and its budget: what `build/bench.json` is a list of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict


class Row(TypedDict):
    """`budget` None: it explains another row. `value` None: it could not be measured, and `error` says why."""

    name: str
    value: float | None
    unit: str
    budget: float | None
    within: bool | None
    peer: str | None
    peer_value: float | None
    error: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Options:
    """`folder`: of this measurement alone. `quick`: so small that the figures mean little, to see that all works."""

    folder: Path
    quick: bool = False

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def points(self, *sizes: int) -> tuple[int, ...]:
        """Of a curve; quick: the two smallest."""
        return sizes[:2] if self.quick else sizes


def at_most(name: str, value: float, unit: str, budget: float) -> Row:
    return Row(name=name, value=value, unit=unit, budget=budget, within=value <= budget, peer=None, peer_value=None)


def at_least(name: str, value: float, unit: str, budget: float) -> Row:
    return Row(name=name, value=value, unit=unit, budget=budget, within=value >= budget, peer=None, peer_value=None)


def only_told(name: str, value: float, unit: str) -> Row:
    """Without a budget."""
    return Row(name=name, value=value, unit=unit, budget=None, within=None, peer=None, peer_value=None)


def failed(names: Sequence[str], error: str) -> list[Row]:
    """For the rows of a measurement that came to nothing."""
    return [
        Row(name=n, value=None, unit="", budget=None, within=None, peer=None, peer_value=None, error=error)
        for n in names
    ]
