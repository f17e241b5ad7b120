"""Block keys to their holders, where blocks that were stored one after the other are kept in one piece.

Engines store the blocks of a prompt in a row, and prompts that begin alike have the same blocks in the same order. Such
a row is a *run*: the keys, packed, and the holders of each. A key leads to its run, and from there on a prompt is
compared with the run as bytes: 512 blocks are a handful of places in memory, not thousands. What follows the last block
of a run goes on with it, for the blocks of an answer are stored one by one.

Nothing is concluded from blocks being in a run: every key is compared. Where nobody holds a block any more, its place
in the run is *dead*, and its key leads nowhere, or to another run. Dead places at the end are cut off.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from kvatlas_common.matching import PromptKeys

Changed = dict[int, Sequence[int]]
"""What the holders of blocks were -> the blocks."""

RUN_MAX = 256  # blocks
PASS_BLOCKS = 8192
"""Blocks that one step of a pass looks at: about a millisecond."""

_PARTS = 256  # of the key space: a dictionary that grows holds everyone up
_PART = _PARTS - 1
_KEY = 8  # bytes
_SAME_MAX = 4096
_NOBODY: Final = [0]


class _Run(msgspec.Struct, gc=False):
    """`live`: places that are not dead. No key is there twice.

    A struct with a tuple, of which the garbage collector knows nothing: it would look at millions of blocks.
    """

    packed: bytearray
    holders: tuple[int, ...] = ()
    live: int = 0

    def put(self, place: int, holders: tuple[int, ...]) -> None:
        """From `place` on."""
        self.holders = self.holders[:place] + holders + self.holders[place + len(holders) :]

    def place(self, key: bytes) -> int:
        """Of a key that leads here."""
        packed = self.packed
        if packed.endswith(key):
            return len(self.holders) - 1
        at = packed.find(key)
        while at % _KEY:
            at = packed.find(key, at + 1)
        return at // _KEY

    def alike(self, place: int, packed: bytes, at: int) -> int:
        """How many keys from `place` on are those of `packed` from `at` on, and not dead. The first one is."""
        blocks = min(len(self.holders) - place, (len(packed) - at) // _KEY)
        if not self._is_alike(place, packed, at, blocks):
            alike, unlike = 1, blocks
            while unlike - alike > 1:
                middle = (alike + unlike) // 2
                if self._is_alike(place, packed, at, middle):
                    alike = middle
                else:
                    unlike = middle
            blocks = alike
        if self.live < len(self.holders) and 0 in (some := self.holders[place : place + blocks]):
            return some.index(0)
        return blocks

    def _is_alike(self, place: int, packed: bytes, at: int, blocks: int) -> bool:
        start, size = place * _KEY, blocks * _KEY
        return self.packed[start : start + size] == packed[at : at + size]


class BlockMap:
    """Holders are integers, a bit per slot; 0 is nobody, and is not kept."""

    def __init__(self) -> None:
        self._parts: list[dict[int, int]] = [{} for _ in range(_PARTS)]  # key -> number of its run
        self._runs: list[_Run | None] = []
        self._free: list[int] = []
        self._same: dict[int, int] = {}  # of holders one object each: blocks in a row mostly have the same
        self._passed: int | None = None  # runs the present pass has done
        self._dead = 0

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, key: int) -> int:
        number = self._parts[key & _PART].get(key)
        if number is None:
            return 0
        run = self._run(number)
        return run.holders[run.place(key.to_bytes(_KEY, sys.byteorder))]

    def get_all(self, keys: PromptKeys) -> list[int]:
        return [holders for stretch in self.stretches(keys) for holders in stretch]

    def stretches(self, keys: PromptKeys) -> Iterator[Sequence[int]]:
        """The holders of each block, in pieces."""
        packed, at = _pack(keys), 0
        parts, runs, end = self._parts, self._runs, len(packed)
        while at < end:
            first = packed[at : at + _KEY]
            key = int.from_bytes(first, sys.byteorder)
            number = parts[key & _PART].get(key)
            if number is None:
                yield _NOBODY
                at += _KEY
                continue
            run = runs[number]
            assert run is not None
            place = run.place(first)
            blocks = run.alike(place, packed, at)
            yield run.holders[place : place + blocks]
            at += blocks * _KEY

    def keys_with(self, bits: Sequence[int]) -> list[list[int]]:
        """Per bit the blocks whose holders have it, in one walk over all."""
        found: list[list[int]] = [[] for _ in bits]
        with_bit, any_of_them = list(zip(bits, found, strict=True)), sum(bits)
        for run in self._runs:
            if run is None:
                continue
            for key, holders in zip(array("Q", run.packed), run.holders, strict=True):
                if holders & any_of_them:
                    for bit, keys in with_bit:
                        if holders & bit:
                            keys.append(key)
        return found

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(self, key: int, holders: int) -> None:
        self.change([key], lambda _: holders)

    def change(self, keys: Sequence[int], to: Callable[[int], int], after: int | None = None) -> Changed:
        """The holders of each block become `to` of what they were. Returns what they were, and of which blocks.

        In order: a key that is there twice is changed twice. `after`: the block that these follow.
        """
        if len(keys) == 1 and (number := self._parts[keys[0] & _PART].get(keys[0])) is not None:
            return self._change_one(number, keys[0], to)
        found: dict[int, list[int]] = {}
        packed, at, behind = _pack(keys), 0, self._behind(after)
        parts = self._parts
        while at < len(keys):
            key = keys[at]
            number = parts[key & _PART].get(key)
            if number is not None:
                run = self._run(number)
                place = run.place(packed[at * _KEY : at * _KEY + _KEY])
                blocks = run.alike(place, packed, at * _KEY)
                for holders, some in self._change(number, place, keys[at : at + blocks], to).items():
                    found.setdefault(holders, []).extend(some)
                behind = number, place + blocks
            else:
                blocks, behind = self._add(keys, packed, at, self._one(to(0)), behind)
                if blocks == len(keys):
                    return {0: keys}
                found.setdefault(0, []).extend(keys[at : at + blocks])
            at += blocks
        return {**found}

    def _change_one(self, number: int, key: int, to: Callable[[int], int]) -> Changed:
        """What `_change` does, for what engines drop block by block."""
        run = self._run(number)
        place = run.place(key.to_bytes(_KEY, sys.byteorder))
        before = run.holders[place]
        after = self._one(to(before))
        run.put(place, (after,))
        if not after:
            del self._parts[key & _PART][key]
            self._bury(number, run, 1)
        return {before: (key,)}

    def _behind(self, key: int | None) -> tuple[int, int] | None:
        """(run, place) behind a block."""
        if key is None or (number := self._parts[key & _PART].get(key)) is None:
            return None
        return number, self._run(number).place(key.to_bytes(_KEY, sys.byteorder)) + 1

    def _change(self, number: int, place: int, keys: Sequence[int], to: Callable[[int], int]) -> Changed:
        """Of blocks in a row in one run, none of them dead."""
        run = self._run(number)
        died: list[int] = []
        end = place + len(keys)
        before = run.holders[place:end]
        if before.count(before[0]) == len(before):
            found: Changed = {before[0]: keys}
        else:
            several: dict[int, list[int]] = {}
            for key, holders in zip(keys, before, strict=True):
                several.setdefault(holders, []).append(key)
            found = {**several}
        after = {holders: self._one(to(holders)) for holders in found}
        run.put(place, tuple([after[holders] for holders in before]))
        for holders, some in found.items():
            if not after[holders]:
                died += some
        for key in died:
            del self._parts[key & _PART][key]
        if died:
            self._bury(number, run, len(died))
        return found

    def _add(
        self, keys: Sequence[int], packed: bytes, at: int, holders: int, behind: tuple[int, int] | None
    ) -> tuple[int, tuple[int, int] | None]:
        """The block at `at`, which nobody holds, and those after it as long as nobody does. Returns how many, and what
        is behind the last.
        """
        if not holders:
            return 1, None
        if behind is not None and (
            taken := self._revive(keys[at], packed[at * _KEY : at * _KEY + _KEY], holders, behind)
        ):
            return 1, taken
        number = self._open_run(behind)
        run, parts, end = self._run(number), self._parts, at
        room = RUN_MAX - len(run.holders)
        for key in keys if len(keys) <= room and not at else keys[at : at + room]:
            part = parts[key & _PART]
            if key in part:
                break
            part[key] = number
            end += 1
        run.packed += packed[at * _KEY : end * _KEY]
        run.holders += (holders,) * (end - at)
        run.live += end - at
        return end - at, (number, len(run.holders))

    def _revive(self, key: int, packed: bytes, holders: int, behind: tuple[int, int]) -> tuple[int, int] | None:
        """A dead place of that very block is taken again."""
        number, place = behind
        run = self._runs[number]
        if run is None or place >= len(run.holders) or run.holders[place]:
            return None
        if run.packed[place * _KEY : place * _KEY + _KEY] != packed:
            return None
        self._parts[key & _PART][key] = number
        run.put(place, (holders,))
        run.live += 1
        return number, place + 1

    def _open_run(self, behind: tuple[int, int] | None) -> int:
        """The one behind whose last block the next comes, if there is room, or a new one."""
        if behind is not None and (run := self._runs[behind[0]]) is not None:
            blocks = len(run.holders)
            if behind[1] == blocks == run.live and blocks < RUN_MAX:
                return behind[0]
        if self._free:
            number = self._free.pop()
            self._runs[number] = _Run(bytearray())
        else:
            number = len(self._runs)
            self._runs.append(_Run(bytearray()))
        return number

    def _bury(self, number: int, run: _Run, died: int) -> None:
        run.live -= died
        if not run.live:
            self._runs[number] = None
            self._free.append(number)
            return
        last = len(run.holders)
        while not run.holders[last - 1]:
            last -= 1
        if last < len(run.holders):
            run.holders = run.holders[:last]
            del run.packed[last * _KEY :]

    def _run(self, number: int) -> _Run:
        run = self._runs[number]
        assert run is not None
        return run

    def _one(self, holders: int) -> int:
        same = self._same.setdefault(holders, holders)
        if len(self._same) > _SAME_MAX:
            self._same = {}
        return same

    # -- what is done to every block -----------------------------------------------------------------------------------

    @property
    def in_pass(self) -> bool:
        return self._passed is not None

    def begin_pass(self, dead: int) -> None:
        """These bits are taken out of all blocks that have them, in steps."""
        self._passed, self._dead = 0, dead

    def step(self) -> bool:
        """Of the pass that was begun; False: it is done. Blocks may be changed between steps."""
        assert self._passed is not None
        seen = 0
        while self._passed < len(self._runs) and seen < PASS_BLOCKS:
            run = self._runs[self._passed]
            if run is not None:
                seen += len(run.holders)
                self._clean(self._passed, run)
            self._passed += 1
            seen += 1
        if self._passed < len(self._runs):
            return True
        self._passed = None
        return False

    def _clean(self, number: int, run: _Run) -> None:
        dead, died = self._dead, 0
        if not any(holders & dead for holders in run.holders):
            return
        keys = array("Q", run.packed)
        left = tuple([self._one(holders & ~dead) for holders in run.holders])
        for key, before, after in zip(keys, run.holders, left, strict=True):
            if before and not after:
                del self._parts[key & _PART][key]
                died += 1
        run.holders = left
        if died:
            self._bury(number, run, died)


def _pack(keys: PromptKeys) -> bytes:
    """8 bytes each, as this machine has them."""
    return keys.tobytes() if isinstance(keys, np.ndarray) else array("Q", keys).tobytes()
