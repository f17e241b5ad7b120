"""Texts of a known length that follow from a seed."""

from __future__ import annotations

import random

_WORDS = (
    "the return for not and file name with that line value from object are get this set type other data can path test "
    "list string option class has call new result module will read key time out method default function add use all "
    "context error used command code number form pass which must"
)
WORDS = _WORDS.split()
"""Plain words, one token each in common vocabularies: lengths in words are about lengths in tokens."""


def text(seed: int, words: int) -> str:
    """`words` words. A shorter text of a seed is the beginning of a longer one."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))
