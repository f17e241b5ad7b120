"""How many leading blocks of a prompt each engine would serve from its cache.

An engine's hit is the longest N for which every full-attention group holds blocks 0..N-1 and every sliding-window group
holds the last ceil((window - 1) / block_size) blocks before N (all of them where N is smaller). A group holds a block
when any of its media does. Speculative decoding drops the last block of the hit.
Source: vLLM 0.32 `v1/core/single_type_kv_cache_manager.py`, `v1/core/kv_cache_coordinator.py`.

Nearly all engines have one full-attention group on one medium: one bit. They are followed all at once, an AND a block;
only where a bit falls out is anything done. The others (hybrid, tiered, or with doubtful entries) are done one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.residency import Place


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
    media: tuple[tuple[Medium, int], ...]  # where a block of the first full-attention group is, nearest first
    doubtful: int


class Plan:
    """What matching needs to know of a set of engines; good until the residency's version changes."""

    def __init__(self, engines: Iterable[EngineGroups]) -> None:
        self._simple: dict[int, tuple[EngineId, bool, Medium, int]] = {}
        self._careful: list[_Careful] = []
        self.engines: list[EngineId] = []
        """All it was made of, also those that hold nothing."""
        for groups in engines:
            self.engines.append(groups.engine)
            if groups.places:
                self._add(groups)
        self._simple_mask = sum(1 << index for index in self._simple)

    def _add(self, groups: EngineGroups) -> None:
        lanes: dict[int, int] = {}
        for (group, _), place in groups.places.items():
            lanes[group] = lanes.get(group, 0) | place.mask
        rules = {group: groups.rules.get(group, GroupRule(Kind.FULL)) for group in lanes}
        if len(groups.places) == 1:
            ((group, medium), place) = next(iter(groups.places.items()))
            if not place.doubts and rules[group].kind is Kind.FULL:
                self._simple[place.live.index] = (groups.engine, groups.exact, medium, groups.drop_last_blocks)
                return
        full = [group for group in sorted(lanes) if rules[group].kind is Kind.FULL]
        expected_full = [g for g, rule in groups.rules.items() if rule.kind is Kind.FULL]
        if not full or any(group not in lanes for group in expected_full):
            return  # a full-attention group holds nothing: neither does the engine
        windows = [g for g, rule in groups.rules.items() if rule.kind is Kind.WINDOW]
        media = {medium: place.mask for (group, medium), place in groups.places.items() if group == full[0]}
        self._careful.append(
            _Careful(
                groups,
                tuple(lanes[group] for group in full),
                tuple((lanes.get(g, 0), groups.rules[g].blocks_needed(groups.block_size)) for g in windows),
                tuple((medium, media[medium]) for medium in Medium if medium in media),
                sum(place.doubt_mask for (group, _), place in groups.places.items() if group == full[0]),
            )
        )

    def match(self, masks: Sequence[int]) -> list[EngineMatch]:
        """`masks[i]`: the holders of the prompt's block i. Engines that would serve nothing are left out."""
        found = self._match_simple(masks)
        for careful in self._careful:
            match = _match_careful(careful, masks)
            if match.blocks:
                found.append(match)
        return found

    def _match_simple(self, masks: Sequence[int]) -> list[EngineMatch]:
        alive, found = self._simple_mask, list[EngineMatch]()
        for depth, holders in enumerate(masks):
            left = alive & holders
            if left != alive:
                if depth:
                    self._report(alive ^ left, depth, found)
                if not left:
                    return found
                alive = left
        if masks:
            self._report(alive, len(masks), found)
        return found

    def _report(self, bits: int, depth: int, found: list[EngineMatch]) -> None:
        while bits:
            low = bits & -bits
            bits ^= low
            engine, exact, medium, dropped = self._simple[low.bit_length() - 1]
            if depth > dropped:
                found.append(EngineMatch(engine, depth - dropped, {medium: depth - dropped}, exact))


def _match_careful(careful: _Careful, masks: Sequence[int]) -> EngineMatch:
    length = len(masks)
    for lane in careful.full:
        length = next((i for i in range(length) if not masks[i] & lane), length)
    previous = -1
    while previous != length:  # a shorter hit for one group is a new question to the others
        previous = length
        for lane, needed in careful.windows:
            length = _window_hit(masks, length, lane, needed)
    length = max(0, length - careful.groups.drop_last_blocks)
    media: dict[Medium, int] = {}
    doubtful = 0
    for holders in masks[:length]:
        medium = next(medium for medium, mask in careful.media if holders & mask)
        media[medium] = media.get(medium, 0) + 1
        doubtful += 1 if holders & careful.doubtful else 0
    return EngineMatch(careful.groups.engine, length, media, careful.groups.exact, doubtful)


def _window_hit(masks: Sequence[int], length: int, lane: int, needed: int) -> int:
    """The longest hit of at most `length` blocks whose last `needed` blocks (or all) the lane holds."""
    run = 0
    for i in range(length - 1, -1, -1):
        if masks[i] & lane:
            run += 1
            if run == needed:
                return i + run
        else:
            run = 0
    return run
