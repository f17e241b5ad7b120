"""The hash settings of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, ExtraKeys, HashProfile
from kvatlas_common.findings.hashing import Hashing


@dataclass(frozen=True, slots=True)
class Expected:
    """The hash settings of the configuration; None: not given."""

    algorithm: Algorithm | None = None
    seed: str | None = None
    block_size: int | None = None

    def profiles(self, block_size: int) -> list[HashProfile]:
        """What the configuration may mean for an engine of this block size."""
        if self.algorithm is None and self.seed is None:
            return []
        algorithms = [self.algorithm] if self.algorithm else list(Algorithm)
        seed = FIXED_SEED if self.seed is None else self.seed
        return [HashProfile(a, seed, block_size, extra) for a in algorithms for extra in _extras_of(a)]

    @property
    def hashing(self) -> Hashing:
        return Hashing(str(self.algorithm) if self.algorithm else None, self.block_size, self.seed)


def _extras_of(algorithm: Algorithm) -> tuple[ExtraKeys, ...]:
    """The likeliest first. 0.10 is the only version with the 64-bit form."""
    if algorithm is Algorithm.SHA256_CBOR_64BIT:
        return (ExtraKeys.LORA_ID, ExtraKeys.LORA_NAME)
    return (ExtraKeys.TAGGED, ExtraKeys.LORA_NAME, ExtraKeys.LORA_ID)
