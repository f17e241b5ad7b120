"""The paged KV cache of one engine: which block is handed out, hit and evicted next.

After vLLM's `v1/core/block_pool.py` (0.10.0 and 0.32): blocks are numbered, block 0 is reserved, free blocks wait in a
queue. Allocation takes from the front, and a taken block that still has a hash is evicted first. A hit takes blocks out
of the queue wherever they are. Two requests may compute the same block before it can be shared: then the pool holds
*copies*, each announced and evicted for itself, and a hit goes to the oldest one.

The versions differ in how blocks come back: 0.10 puts all of them at the back of the queue, 0.32 puts those that can
never be hit (no hash) at the front, to be reused at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import StrEnum

from kvatlas_loadtest.kv_events import BlockHash, Cleared, KvEvent, Removed, key_of


class PoolVersion(StrEnum):
    """Whose rules the pool follows: vLLM's up to 0.10, or 0.32's."""

    V0_10 = "0.10"
    V0_32 = "0.32"


class BlockPool:
    """`num_blocks` blocks, the reserved one included, as `--num-gpu-blocks-override` counts them.

    `log` receives the evictions and resets, in order.
    """

    def __init__(self, num_blocks: int, version: PoolVersion, log: list[KvEvent]) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool of {num_blocks} blocks holds nothing: block 0 is reserved")
        self.num_blocks = num_blocks
        self._version = version
        self._log = log
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # front: next to be taken
        self._users = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._holders: dict[BlockHash, list[int]] = {}  # oldest copy first
        self._arrived: dict[BlockHash, int] = {}  # since when one is held without a break, by the count of arrivals
        self._arrivals = 0

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, 0..1. Cached blocks nobody uses count as free."""
        return 1.0 - len(self._free) / (self.num_blocks - 1)

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks holding the leading `hashes`, up to the first that is not cached. Takes nothing."""
        found: list[int] = []
        for block_hash in hashes:
            holders = self._holders.get(block_hash)
            if holders is None:
                break
            found.append(holders[0])
        return found

    def unused(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free queue: sharing them makes that many blocks less free."""
        return sum(1 for block in blocks if not self._users[block])

    def share(self, blocks: Iterable[int]) -> None:
        """One more request uses these cached blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._free[block]
            self._users[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks for one request, evicting what they held. The caller has checked `free_blocks`."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._evict(block)
            self._users[block] = 1
        return taken

    def name(self, blocks: Sequence[int], hashes: Sequence[BlockHash]) -> None:
        """The blocks are full now: they can be hit under their hashes."""
        for block, block_hash in zip(blocks, hashes, strict=True):
            self._hash_of[block] = block_hash
            self._holders.setdefault(block_hash, []).append(block)
            if block_hash not in self._arrived:
                self._arrivals += 1
                self._arrived[block_hash] = self._arrivals

    def release(self, blocks: Sequence[int]) -> None:
        """A request is done with its blocks, given from its first to its last; its last is reused first."""
        kept: list[int] = []
        nameless: list[int] = []
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                hashed = self._version is PoolVersion.V0_10 or self._hash_of[block] is not None
                (kept if hashed else nameless).append(block)
        for block in reversed(nameless):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        for block in kept:
            self._free[block] = None

    def reset(self) -> bool:
        """Forgets all hashes, keeping the queue's order; refused (False) while a request holds a block."""
        if len(self._free) != self.num_blocks - 1:
            return False
        self._hash_of = [None] * self.num_blocks
        self._holders.clear()
        self._arrived.clear()
        self._log.append(Cleared())
        return True

    def copies(self) -> dict[int, int]:
        """Block key -> how many blocks hold it: the truth an index is checked against."""
        return {key_of(block_hash): len(blocks) for block_hash, blocks in self._holders.items()}

    def arrivals(self) -> dict[int, int]:
        """Block key -> a number that stays as long as the block is held without a break, and is never given again."""
        return {key_of(block_hash): number for block_hash, number in self._arrived.items()}

    def _evict(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is None:
            return
        self._hash_of[block] = None
        holders = self._holders[block_hash]
        holders.remove(block)
        if not holders:
            del self._holders[block_hash], self._arrived[block_hash]
        self._log.append(Removed(block_hash))
