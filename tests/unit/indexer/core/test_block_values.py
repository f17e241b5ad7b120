"""Masks of block values, against going through every record."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_indexer.core.block_values import VALUES_REMEMBERED_MAX, WIDE_BYTES, BlockMasks

NUMBERS = [1, 2, 65536 + 1, 2 * 65536 + 1, 2**32 - 1, 70, 71, 72]
STRANGERS = [0, 3, 3 * 65536 + 1, 2**32 - 2]
"""In no record; some with the low bits of ours."""


def value(numbers: list[int]) -> bytes:
    return b"".join(struct.pack(">IB", number, 1 + number % 255) for number in numbers)


def naive(slots: list[int], held: list[int]) -> int:
    return sum(1 << slots.index(number) for number in set(held) if number in slots)


holders = st.lists(st.sampled_from(NUMBERS + STRANGERS), max_size=20, unique=True)
prompts = st.lists(holders, max_size=60)


@given(slots=st.permutations(NUMBERS).flatmap(lambda s: st.integers(0, len(s)).map(lambda n: s[:n])), prompt=prompts)
def test_masks_are_those_of_every_record(slots: list[int], prompt: list[list[int]]) -> None:
    masks = BlockMasks(slots)
    expected = [naive(slots, held) for held in prompt]
    assert masks.masks([value(held) or None for held in prompt]) == expected
    assert masks.masks([value(held) for held in prompt]) == expected  # remembered


@given(prompt=st.lists(holders, min_size=1, max_size=30))
def test_many_records_at_once_and_few_read_the_same(prompt: list[list[int]]) -> None:
    values = [value(held) + struct.pack(">IB", 5, i) for i, held in enumerate(prompt)]
    wide = [v + value([3]) * WIDE_BYTES for v in values]
    assert BlockMasks(NUMBERS).masks(wide) == [m for v in values for m in BlockMasks(NUMBERS).masks([v])]


def test_a_value_cut_off_holds_what_it_holds_up_to_there() -> None:
    whole = value([1, 70])
    assert BlockMasks([1, 70]).masks([whole[:-1], whole[:4], whole]) == [0b01, 0, 0b11]
    wide = value([1] * WIDE_BYTES) + b"\0\0"
    assert BlockMasks([1, 70]).masks([whole[:-1], wide]) == [0b01, 0b01]


def test_what_is_remembered_is_bounded() -> None:
    masks = BlockMasks([1])
    for start in range(0, 3 * VALUES_REMEMBERED_MAX, 512):
        masks.masks([value([1, 1000 + start + i]) for i in range(512)])
        assert len(masks._remembered) <= VALUES_REMEMBERED_MAX
