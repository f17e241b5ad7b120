"""Blocks in runs, held against a dictionary that nobody could get wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvatlas_indexer.core.block_map import PASS_BLOCKS, RUN_MAX, BlockMap

A, B, C = 1, 2, 1 << 200
PROMPT = [(n * 0x9E3779B97F4A7C15 + 7) % 2**64 for n in range(1000)]


def stored(*runs: Sequence[int], bit: int = A) -> BlockMap:
    blocks = BlockMap()
    for keys in runs:
        add(blocks, keys, bit)
    return blocks


def add(blocks: BlockMap, keys: Sequence[int], bit: int, after: int | None = None) -> None:
    blocks.change(keys, lambda holders: holders | bit, after)


def drop(blocks: BlockMap, keys: Sequence[int], bit: int) -> None:
    blocks.change(keys, lambda holders: holders & ~bit)


def pieces(blocks: BlockMap, keys: Sequence[int]) -> list[int]:
    """How long the stretches are in which a prompt is looked up."""
    return [len(stretch) for stretch in blocks.stretches(keys)]


def test_what_follows_a_block_goes_on_with_its_run() -> None:
    blocks = BlockMap()
    add(blocks, PROMPT[:40], A)
    for before, key in pairwise(PROMPT[39:100]):
        add(blocks, [key], A, before)
    assert pieces(blocks, PROMPT[:100]) == [100]


def test_without_knowing_what_it_follows_each_store_is_its_own() -> None:
    assert pieces(stored(PROMPT[:40], PROMPT[40:50]), PROMPT[:60]) == [40, 10, *[1] * 10]


def test_runs_are_bounded() -> None:
    assert pieces(stored(PROMPT), PROMPT) == [RUN_MAX, RUN_MAX, RUN_MAX, len(PROMPT) - 3 * RUN_MAX]


def test_a_second_holder_of_more_and_of_less() -> None:
    blocks = stored(PROMPT[:100])
    add(blocks, PROMPT[:60], B)
    add(blocks, PROMPT[:130], C)
    assert blocks.get_all(PROMPT[:131]) == [A | B | C] * 60 + [A | C] * 40 + [C] * 30 + [0]
    assert pieces(blocks, PROMPT[:130]) == [130]


def test_another_prompt_may_branch_off_anywhere() -> None:
    blocks, other = stored(PROMPT[:100]), [*PROMPT[:37], *PROMPT[500:540]]
    add(blocks, other, B)
    assert pieces(blocks, other) == [37, 40]
    assert blocks.get_all(other) == [A | B] * 37 + [B] * 40
    assert blocks.get_all(PROMPT[:100]) == [A | B] * 37 + [A] * 63


@pytest.mark.parametrize("common", range(20))
def test_however_much_is_common(common: int) -> None:
    blocks = stored(PROMPT[:19])
    assert blocks.get_all([*PROMPT[:common], *PROMPT[500:510]]) == [A] * min(common, 19) + [0] * (
        10 + max(common - 19, 0)
    )


def test_dropped_from_the_end_and_brought_back() -> None:
    blocks = stored(PROMPT[:100])
    for key in reversed(PROMPT[50:100]):
        drop(blocks, [key], A)
    assert blocks.get_all(PROMPT[:51]) == [A] * 50 + [0]
    add(blocks, PROMPT[50:100], A, PROMPT[49])
    assert pieces(blocks, PROMPT[:100]) == [100]


def test_dropped_from_the_middle_and_brought_back() -> None:
    blocks = stored(PROMPT[:100])
    drop(blocks, PROMPT[20:60], A)
    assert blocks.get_all(PROMPT[:100]) == [A] * 20 + [0] * 40 + [A] * 40
    add(blocks, PROMPT[20:60], B, PROMPT[19])
    assert blocks.get_all(PROMPT[:100]) == [A] * 20 + [B] * 40 + [A] * 40
    assert pieces(blocks, PROMPT[:100]) == [100]  # at the places they had


def test_brought_back_elsewhere_while_the_old_place_is_dead() -> None:
    blocks = stored(PROMPT[:10])
    drop(blocks, [PROMPT[3]], A)
    add(blocks, [PROMPT[3], PROMPT[700]], B)
    add(blocks, PROMPT[:10], C)
    assert blocks.get_all(PROMPT[:10]) == [A | C] * 3 + [B | C] + [A | C] * 6
    assert len(blocks) == 11


def test_it_tells_what_the_holders_were_and_in_order() -> None:
    blocks = stored(PROMPT[:4])
    changed = blocks.change([PROMPT[2], PROMPT[8], PROMPT[8], PROMPT[2]], lambda holders: holders | B)
    assert {holders: list(keys) for holders, keys in changed.items()} == {
        A: [PROMPT[2]],
        0: [PROMPT[8]],
        B: [PROMPT[8]],
        A | B: [PROMPT[2]],
    }


def test_keys_whose_bytes_begin_within_others() -> None:
    keys = [0, 1 << 56, 1, 256, 1 << 8, 0x0100000000000000, 2**64 - 1, 0x00FF000000000000]
    blocks = stored(list(dict.fromkeys(keys)))
    for key in dict.fromkeys(keys):
        assert blocks.get(key) == A
        drop(blocks, [key], A)
        assert blocks.get(key) == 0
    assert len(blocks) == 0


def test_keys_as_numpy_has_them() -> None:
    blocks = stored(PROMPT[:10])
    assert blocks.get_all(np.array(PROMPT[:12], np.uint64)) == blocks.get_all(PROMPT[:12])


def test_a_pass_takes_bits_out_while_blocks_come_and_go() -> None:
    blocks = BlockMap()
    prompts = [[key ^ n for key in PROMPT[:200]] for n in range(1, 200)]
    for prompt in prompts:
        add(blocks, prompt, A)
        add(blocks, prompt[:100], B)
    blocks.begin_pass(A)
    steps = 0
    while blocks.step():
        add(blocks, [2**63 + steps], B)
        drop(blocks, prompts[steps][:100], B)
        add(blocks, prompts[-1 - steps][100:110], B)
        steps += 1
    assert steps >= 199 * 200 // PASS_BLOCKS - 1
    assert not blocks.in_pass
    assert [len(keys) for keys in blocks.keys_with([A, B])] == [0, 199 * 100 + steps - 100 * steps + 10 * steps]


LINES = [[(line * 1000 + n) * 0x9E3779B97F4A7C15 % 2**64 for n in range(30)] for line in range(3)]


@st.composite
def rows(draw: st.DrawFn) -> list[int]:
    """Part of a prompt; of two, where one branches off from the other; or anything."""
    line, other = draw(st.sampled_from(LINES)), draw(st.sampled_from(LINES))
    start, cut, end = sorted(draw(st.tuples(*[st.integers(0, 30)] * 3)))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return [line[n] for n in draw(st.lists(st.integers(0, 29), max_size=6))]
    row = [*line[start:cut], *(line if kind < 3 else other)[cut:end]]
    return row[::-1] if kind == 1 else row


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.blocks = BlockMap()
        self.oracle: Counter[int] = Counter()

    @rule(keys=rows(), bit=st.sampled_from([A, B, C]), after=st.none() | st.sampled_from(LINES[0]))
    def store(self, keys: list[int], bit: int, after: int | None) -> None:
        self.told(self.blocks.change(keys, lambda holders: holders | bit, after), keys, bit, store=True)

    @rule(keys=rows(), bit=st.sampled_from([A, B, C]))
    def remove(self, keys: list[int], bit: int) -> None:
        self.told(self.blocks.change(keys, lambda holders: holders & ~bit), keys, bit, store=False)

    def told(self, changed: dict[int, Sequence[int]], keys: list[int], bit: int, *, store: bool) -> None:
        expected: dict[int, list[int]] = {}
        for key in keys:
            before = self.oracle[key]
            expected.setdefault(before, []).append(key)
            self.oracle[key] = before | bit if store else before & ~bit
        assert {holders: sorted(some) for holders, some in changed.items() if some} == {
            holders: sorted(some) for holders, some in expected.items()
        }

    @rule(key=st.sampled_from(LINES[1]), holders=st.sampled_from([0, A, B | C]))
    def put(self, key: int, holders: int) -> None:
        self.blocks.put(key, holders)
        self.oracle[key] = holders

    @rule(bit=st.sampled_from([A, B, C]))
    def sweep(self, bit: int) -> None:
        self.blocks.begin_pass(bit)
        while self.blocks.step():
            pass
        self.oracle = Counter({key: holders & ~bit for key, holders in self.oracle.items()})

    @invariant()
    def they_agree(self) -> None:
        for line in LINES:
            assert self.blocks.get_all(line) == [self.oracle[key] for key in line]
            assert [self.blocks.get(key) for key in line[::7]] == [self.oracle[key] for key in line[::7]]
        held = {key: holders for key, holders in self.oracle.items() if holders}
        assert len(self.blocks) == len(held)
        found = self.blocks.keys_with([A, B, C])
        for bit, keys in zip([A, B, C], found, strict=True):
            assert sorted(keys) == sorted(key for key, holders in held.items() if holders & bit)


def test_it_agrees_with_the_oracle() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=80, stateful_step_count=30, deadline=None))
