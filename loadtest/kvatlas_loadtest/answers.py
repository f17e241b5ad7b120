"""What simulated engines answer: common words, in an order that only the seed and the prompt decide.

Each token is a whole word of the model's own vocabulary, so that an answer sent back in the next turn is tokenised to
the very tokens that were generated, and hits the blocks they filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

_MULTIPLIER = 0x9E3779B97F4A7C15  # Weyl sequence of splitmix64
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class AnswerWords:
    """Token ids to answer with: `opening` words stand at the start of a message, `following` begin with a space."""

    opening: Sequence[int]
    following: Sequence[int]

    def __post_init__(self) -> None:
        if not self.opening or not self.following:
            raise ValueError("no whole words in this vocabulary to answer with")

    def sampler(self, prompt: Sequence[int], seed: int, continues: bool) -> Callable[[int], int]:
        """The i-th token of the answer to `prompt`. `continues`: it goes on in the prompt's last line (completions)."""
        state = xxhash.xxh3_64_intdigest(np.asarray(prompt, np.int64).tobytes(), seed & _MASK)

        def sample(index: int) -> int:
            words = self.opening if index == 0 and not continues else self.following
            return words[_mixed(state + index * _MULTIPLIER) % len(words)]

        return sample


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return (value ^ (value >> 27)) & _MASK
