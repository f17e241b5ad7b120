"""What a simulated cache says of itself, before it is put on a wire.

A block's hash is either its block key (an unsigned 64-bit integer) or the 32 bytes the key is the end of: whichever the
engine publishes. The pool only compares hashes, so both work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

BlockHash: TypeAlias = int | bytes
ExtraKeys: TypeAlias = tuple[str, ...] | None  # of one block, untagged, as events carry them


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks of one prompt became full. `parent`: hash of the block before the first, None at the start."""

    hashes: Sequence[BlockHash]
    parent: BlockHash | None
    token_ids: Sequence[int]  # len(hashes) * block_size
    extra_keys: Sequence[ExtraKeys]  # one per block
    lora_name: str | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    """One block was evicted; vLLM removes them one by one."""

    hash: BlockHash


@dataclass(frozen=True, slots=True)
class Cleared:
    """The whole prefix cache was reset."""


KvEvent: TypeAlias = Stored | Removed | Cleared


def key_of(block_hash: BlockHash) -> int:
    """The block key of a published hash: of 32 bytes, the last 8, big-endian."""
    return block_hash if isinstance(block_hash, int) else int.from_bytes(block_hash[-8:], "big")
