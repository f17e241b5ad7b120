"""The pool against a naive one: lists scanned from the front, no bookkeeping to get wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_loadtest.block_pool import BlockPool, PoolVersion
from kvatlas_loadtest.kv_events import Cleared, KvEvent, Removed


@dataclass
class NaivePool:
    version: PoolVersion
    queue: list[int]
    users: dict[int, int] = field(default_factory=dict)
    named: list[tuple[int, int]] = field(default_factory=list)  # (hash, block), oldest first
    log: list[KvEvent] = field(default_factory=list)

    def find(self, hashes: list[int]) -> list[int]:
        found = []
        for wanted in hashes:
            holders = [block for block_hash, block in self.named if block_hash == wanted]
            if not holders:
                break
            found.append(holders[0])
        return found

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if block in self.queue:
                self.queue.remove(block)
            self.users[block] = self.users.get(block, 0) + 1

    def allocate(self, count: int) -> list[int]:
        taken = [self.queue.pop(0) for _ in range(count)]
        for block in taken:
            for entry in [e for e in self.named if e[1] == block]:
                self.named.remove(entry)
                self.log.append(Removed(entry[0]))
            self.users[block] = 1
        return taken

    def release(self, blocks: list[int]) -> None:
        front: list[int] = []
        for block in blocks[::-1]:
            self.users[block] -= 1
            if self.users[block] == 0:
                nameless = all(block != b for _, b in self.named)
                (front if nameless and self.version is PoolVersion.V0_32 else self.queue).append(block)
        self.queue = front + self.queue


def requests() -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """(what, which prompt or request, how many blocks)."""
    return st.lists(st.tuples(st.sampled_from(["start", "end", "reset"]), st.integers(0, 5), st.integers(0, 6)))


@given(requests(), st.sampled_from(list(PoolVersion)))
def test_the_pool_equals_a_naive_one(steps: list[tuple[str, int, int]], version: PoolVersion) -> None:
    log: list[KvEvent] = []
    pool, naive = BlockPool(12, version, log), NaivePool(version, list(range(1, 12)))
    held: list[list[int]] = []
    for what, which, count in steps:
        if what == "start":
            hashes = [100 * which + i for i in range(count)]
            hits = pool.find(hashes)
            assert hits == naive.find(hashes)
            missing = count + 1 - len(hits)  # one block more than has a name
            if missing + pool.unused(hits) > pool.free_blocks:
                continue
            pool.share(hits)
            naive.share(hits)
            fresh = pool.allocate(missing)
            assert fresh == naive.allocate(missing)
            pool.name(fresh[: count - len(hits)], hashes[len(hits) :])
            naive.named += zip(hashes[len(hits) :], fresh, strict=False)
            held.append(hits + fresh)
        elif what == "end" and held:
            blocks = held.pop(which % len(held))
            pool.release(blocks)
            naive.release(blocks)
        elif what == "reset":
            if pool.reset():
                assert not held
                naive.named.clear()
                naive.log.append(Cleared())
            else:
                assert held
    assert log == naive.log
    assert pool.free_blocks == len(naive.queue)
    assert pool.copies() == {h: [x for x, _ in naive.named].count(h) for h, _ in naive.named}
    assert pool.allocate(pool.free_blocks) == naive.queue  # the same order of eviction


def test_two_requests_may_hold_copies_and_a_hit_goes_to_the_oldest() -> None:
    log: list[KvEvent] = []
    pool = BlockPool(4, PoolVersion.V0_32, log)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first, [7])
    pool.name(second, [7])
    assert pool.copies() == {7: 2}
    assert pool.find([7]) == first
    pool.release(first)
    pool.release(second)
    pool.allocate(2)  # the never used block, then the first copy
    assert (log, pool.copies(), pool.find([7])) == ([Removed(7)], {7: 1}, second)


def test_a_block_that_was_away_has_arrived_anew() -> None:
    pool = BlockPool(4, PoolVersion.V0_32, [])
    first, second = pool.allocate(1), pool.allocate(1)
    pool.name(first, [7])
    pool.name(second, [7])
    assert pool.arrivals() == {7: 1}
    pool.release(first)
    pool.allocate(2)  # the first copy goes: the block is still held
    assert pool.arrivals() == {7: 1}
    pool.release(second)
    pool.name(pool.allocate(1), [7])  # in the place of the second copy
    assert pool.arrivals() == {7: 2}


def test_a_block_without_a_name_is_reused_first_since_0_32() -> None:
    for version, reused in ((PoolVersion.V0_10, 3), (PoolVersion.V0_32, 2)):
        pool = BlockPool(4, version, [])
        blocks = pool.allocate(2)
        pool.name(blocks[:1], [7])
        pool.release(blocks)
        assert pool.allocate(1) == [reused]


def test_a_pool_needs_more_than_the_reserved_block() -> None:
    with pytest.raises(ValueError, match="reserved"):
        BlockPool(1, PoolVersion.V0_32, [])
