"""What residency is made of: slots (one bit each), and the places they stand at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvatlas_common.words import EngineId, Medium


class Slot:
    """One bit of residency: what one (engine, group, medium) has stored in one generation."""

    __slots__ = ("bit", "blocks", "copies", "doubtful_since", "engine", "group", "index", "medium", "number")

    def __init__(self, index: int, engine: EngineId, group: int, medium: Medium) -> None:
        self.index = index
        self.bit = 1 << index
        self.engine = engine
        self.group = group
        self.medium = medium
        self.doubtful_since: float | None = None
        self.blocks = 0  # keys that have this bit
        self.copies: dict[int, int] = {}  # key -> copies, where there is more than one
        self.number: int | None = None  # its name in a shared store, once it has one


class Journal(Protocol):
    """Told of every change, by whoever keeps a copy of the residency elsewhere."""

    def touch(self, slot: Slot, keys: Iterable[int]) -> None:
        """The copies of these blocks in this slot may have changed."""
        ...

    def retired(self, slot: Slot) -> None:
        """Nothing of this slot holds any more."""
        ...


class Place:
    """An (engine, group, medium): the slot that is written, and the doubtful ones before it, oldest first."""

    __slots__ = ("doubt_mask", "doubts", "live")

    def __init__(self, live: Slot) -> None:
        self.live = live
        self.doubts: list[Slot] = []
        self.doubt_mask = 0

    @property
    def mask(self) -> int:
        return self.live.bit | self.doubt_mask

    def slots(self) -> list[Slot]:
        return [*self.doubts, self.live]
