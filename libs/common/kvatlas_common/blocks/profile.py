"""A hash profile is everything that decides the key of a block; two engines share keys exactly if theirs are equal.

It travels between processes as its `name`: one line of text, the seed last because a seed may contain anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

FIXED_SEED = "vllm-none-hash"
"""What vLLM 0.32 (v1/core/kv_cache_utils.py) seeds sha256* with where `PYTHONHASHSEED` is not set."""

BLOCK_SIZE_MAX = 1 << 20  # tokens
SEED_CHARS_MAX = 1024


class Algorithm(StrEnum):
    """`--prefix-caching-hash-algo`, by vLLM's names."""

    SHA256_CBOR_64BIT = "sha256_cbor_64bit"  # 0.10
    SHA256_CBOR = "sha256_cbor"  # 0.11 and later
    SHA256 = "sha256"
    XXHASH_CBOR = "xxhash_cbor"  # 0.16 and later
    XXHASH = "xxhash"


class ExtraKeys(StrEnum):
    """How LoRA, salt and multimodal content go into a hash."""

    LORA_ID = "lora-id"  # bare values, an adapter as its integer id: vLLM 0.10
    LORA_NAME = "lora-name"  # bare values, an adapter as its name: later, and up to 0.31
    TAGGED = "tagged"  # ("lora", name, path), ("mm", id, offset), ("cache_salt", salt): vLLM 0.32


_NAME = re.compile(
    r"(?P<algorithm>[^/]*)/b(?P<block_size>[1-9][0-9]{0,9})/(?P<extra_keys>[^/]*)/seed=(?P<seed>.*)", re.S
)


@dataclass(frozen=True, slots=True)
class HashProfile:
    """How an engine names its blocks. `seed` is the seed string, `block_size` in tokens.

    Raises `ValueError` for a block size or a seed out of bounds.
    """

    algorithm: Algorithm
    seed: str
    block_size: int
    extra_keys: ExtraKeys

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= BLOCK_SIZE_MAX:
            raise ValueError(f"hash profile: block size {self.block_size} is not within 1..{BLOCK_SIZE_MAX}")
        if len(self.seed) > SEED_CHARS_MAX:
            raise ValueError(f"hash profile: a seed of {len(self.seed)} characters, {SEED_CHARS_MAX} at most")
        if any("\ud800" <= c <= "\udfff" for c in self.seed):
            raise ValueError("hash profile: the seed is not valid Unicode")

    @property
    def name(self) -> str:
        """The profile as text, e.g. `sha256_cbor/b64/tagged/seed=42`; `parse` is the inverse."""
        return f"{self.algorithm}/b{self.block_size}/{self.extra_keys}/seed={self.seed}"

    @classmethod
    def parse(cls, name: str) -> HashProfile:
        """Raises `ValueError` that quotes the name and says what is wrong with it."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"hash profile {name!r} is not <algorithm>/b<block size>/<extra keys>/seed=<seed>")
        try:
            algorithm = Algorithm(found["algorithm"])
        except ValueError:
            raise ValueError(f"hash profile {name!r}: algorithm is none of {', '.join(Algorithm)}") from None
        try:
            extra_keys = ExtraKeys(found["extra_keys"])
        except ValueError:
            raise ValueError(f"hash profile {name!r}: extra keys are none of {', '.join(ExtraKeys)}") from None
        return cls(algorithm, found["seed"], int(found["block_size"]), extra_keys)


def recomputed(block_size: int) -> HashProfile:
    """The profile of our own, for engines whose hashes cannot be reproduced: their blocks are hashed again with it.

    Cheap, because every token of such an engine's events is hashed here. Adapters go in by name, because events carry
    no path.
    """
    return HashProfile(Algorithm.XXHASH_CBOR, "kvatlas-recomputed", block_size, ExtraKeys.LORA_NAME)
