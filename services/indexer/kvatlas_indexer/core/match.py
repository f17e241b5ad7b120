"""How many leading blocks of a prompt each engine would serve from its cache.

An engine's hit is the longest N for which every full-attention group holds blocks 0..N-1 and every sliding-window group
holds the last ceil((window - 1) / block_size) blocks before N (all of them where N is smaller). A group holds a block
when any of its media does. Speculative decoding drops the last block of the hit.
Source: vLLM 0.32 `v1/core/single_type_kv_cache_manager.py`, `v1/core/kv_cache_coordinator.py`.

Nearly all engines have one full-attention group, on the GPU: one bit. They are followed all at once, an AND a block;
only where a bit falls out is anything done. The others (hybrid, tiered, or with doubtful entries) are done one by one,
over the runs of blocks that have the same holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import TypeAlias

from kvatlas_common.matching import EngineMatch, MatchAnswer, PlainMatches
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.slots import Place


class Kind(Enum):
    """What a group of an engine needs of the blocks before the hit's end."""

    FULL = "all of them"
    WINDOW = "the last few"
    UNKNOWN = "not known: not asked for, and the engine is inexact"


_KINDS = {
    None: Kind.FULL,
    "full_attention": Kind.FULL,
    "mla_attention": Kind.FULL,
    "sink_full_attention": Kind.FULL,
    "sliding_window": Kind.WINDOW,
    "sliding_window_mla": Kind.WINDOW,
}


@dataclass(frozen=True, slots=True)
class GroupRule:
    """What is known of one cache group: its kind as the engine calls it, and its window in tokens."""

    kind: Kind
    name: str | None = None
    window: int | None = None

    @classmethod
    def of(cls, name: str | None, window: int | None) -> GroupRule:
        kind = _KINDS.get(name, Kind.UNKNOWN)
        return cls(Kind.UNKNOWN if kind is Kind.WINDOW and window is None else kind, name, window)

    @staticmethod
    def is_full(name: str | None) -> bool:
        """Whether an engine's group of this kind is a full-attention group."""
        return _KINDS.get(name) is Kind.FULL

    def blocks_needed(self, block_size: int) -> int:
        """How many blocks before the end of the hit a window group must hold."""
        assert self.window is not None
        return max(1, -(-(self.window - 1) // block_size))


@dataclass(frozen=True, slots=True)
class EngineGroups:
    """One engine as the matching sees it."""

    engine: EngineId
    exact: bool
    places: Mapping[tuple[int, Medium], Place]
    rules: Mapping[int, GroupRule]
    block_size: int
    drop_last_blocks: int = 0  # speculative decoding computes so many of the last matched blocks again


@dataclass(frozen=True, slots=True)
class _Careful:
    """An engine that is matched on its own."""

    groups: EngineGroups
    full: tuple[int, ...]  # a mask per full-attention group: any of these bits will do
    windows: tuple[tuple[int, int], ...]  # (mask, blocks needed) per window group
    media: tuple[tuple[Medium, int], ...]  # where a block of the group that tells is, nearest first
    doubtful: int


Run: TypeAlias = tuple[int, int, int]
"""(holders, first block, end): consecutive blocks of the prompt with the same holders."""


class Plan:
    """What matching needs to know of a set of engines; good until the residency's version changes."""

    def __init__(self, engines: Iterable[EngineGroups]) -> None:
        self._simple: dict[int, tuple[EngineId, bool, int]] = {}
        self._careful: list[_Careful] = []
        self.engines: list[EngineId] = []
        """All it was made of, also those that hold nothing."""
        for groups in engines:
            self.engines.append(groups.engine)
            if groups.places:
                self._add(groups)
        self._simple_mask = sum(1 << index for index in self._simple)
        self.needs_all = any(not careful.full for careful in self._careful)
        """Whether blocks matter that come after one nobody holds: to an engine without full attention."""

    def _add(self, groups: EngineGroups) -> None:
        lanes: dict[int, int] = {}
        for (group, _), place in groups.places.items():
            lanes[group] = lanes.get(group, 0) | place.mask
        rules = {**{group: GroupRule(Kind.FULL) for group in lanes}, **groups.rules}
        full = [group for group in sorted(rules) if rules[group].kind is Kind.FULL]
        windows = [group for group in sorted(rules) if rules[group].kind is Kind.WINDOW]
        asked = [*full, *windows]
        if not asked or any(group not in lanes for group in asked):
            return  # a group that must hold something holds nothing: neither does the engine
        ((_, medium), place), *more = groups.places.items()
        if medium is Medium.GPU and not more and not windows and not place.doubts:
            self._simple[place.live.index] = (groups.engine, groups.exact, groups.drop_last_blocks)
            return
        telling = {medium: place for (group, medium), place in groups.places.items() if group == asked[0]}
        self._careful.append(
            _Careful(
                groups,
                tuple(lanes[group] for group in full),
                tuple((lanes[group], rules[group].blocks_needed(groups.block_size)) for group in windows),
                tuple((medium, telling[medium].mask) for medium in Medium if medium in telling),
                sum(place.doubt_mask for place in telling.values()),
            )
        )

    @property
    def simple(self) -> int | None:
        """A bit per engine, if one bit tells all there is to know of every engine: `matched` is then enough."""
        return None if self._careful else self._simple_mask

    def match(self, masks: Sequence[int]) -> MatchAnswer:
        """`masks[i]`: the holders of the prompt's block i. Engines that would serve nothing are left out."""
        runs = list(_runs(masks)) if self._careful else []
        careful = [match for careful in self._careful if (match := _match_careful(careful, runs)).blocks]
        return MatchAnswer(tuple(careful), plain=self.matched(_fall_outs(masks, self._simple_mask)))

    def matched(self, fall_outs: Iterable[tuple[int, int]]) -> PlainMatches:
        """`fall_outs`: after how many leading blocks which engines' bits are missing."""
        simple = self._simple
        engines: list[EngineId] = []  # `list[...]()` would take a microsecond
        all_blocks: list[int] = []
        exacts: list[bool] = []
        for depth, fallen in fall_outs:
            bits = fallen if depth else 0
            while bits:
                index = bits.bit_length() - 1
                bits ^= 1 << index
                engine, exact, dropped = simple[index]
                if depth > dropped:
                    engines.append(engine)
                    all_blocks.append(depth - dropped)
                    exacts.append(exact)
        return PlainMatches(engines, all_blocks, exacts)


def _fall_outs(masks: Sequence[int], bits: int) -> Iterator[tuple[int, int]]:
    alive, same = bits, -1
    for depth, holders in enumerate(masks):
        if holders != same:
            left = alive & holders
            if left != alive:
                yield depth, alive ^ left
                if not left:
                    return
                alive = left
            same = holders
    yield len(masks), alive


def _runs(masks: Sequence[int]) -> Iterator[Run]:
    first = 0
    for holders, run in groupby(masks):
        end = first + sum(1 for _ in run)
        yield holders, first, end
        first = end


def _match_careful(careful: _Careful, runs: Sequence[Run]) -> EngineMatch:
    length = runs[-1][2] if runs else 0
    for lane in careful.full:
        length = next((first for holders, first, _ in runs if first < length and not holders & lane), length)
    previous = -1
    while previous != length:  # a shorter hit for one group is a new question to the others
        previous = length
        for lane, needed in careful.windows:
            length = _window_hit(runs, length, lane, needed)
    length = max(0, length - careful.groups.drop_last_blocks)
    media: dict[Medium, int] = {}
    doubtful, nearest = 0, careful.media[0][0]
    for holders, first, end in runs:
        if first >= length:
            break
        blocks = min(end, length) - first
        # without full attention, blocks before the window need not be anywhere
        medium = next((medium for medium, mask in careful.media if holders & mask), nearest)
        media[medium] = media.get(medium, 0) + blocks
        doubtful += blocks if holders & careful.doubtful else 0
    return EngineMatch(careful.groups.engine, length, media, careful.groups.exact, doubtful)


def _window_hit(runs: Sequence[Run], length: int, lane: int, needed: int) -> int:
    """The longest hit of at most `length` blocks whose last `needed` blocks (or all) the lane holds."""
    held_to = 0
    for holders, first, end in reversed(runs):
        if first >= length:
            continue
        if not holders & lane:
            held_to = 0
            continue
        held_to = held_to or min(end, length)
        if held_to - first >= needed:
            return held_to
    return held_to
