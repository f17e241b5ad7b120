"""What is asked: a bounded set of prompts, again and again, more of them than the engines have room for.

So engines store and evict all the time, while the index, the caches of tokens and keys and the histories reach a size
and stay there: what grows all the same, leaks. Prompts that are new every time (`prompts` 0) fill caches up to their
bounds first (256 MB of tokens and keys per model in a router), which takes hours at this rate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kvatlas_loadtest.chaos.load import Shape, bodies


def asked(shape: Shape, seed: int, prompts: int) -> Iterator[dict[str, Any]]:
    """Request bodies without end; each of the `prompts` once in every round, in another order each time."""
    made = bodies(shape, seed)
    if not prompts:
        yield from made
    chance, these = random.Random(seed + 2), list(islice(made, prompts))
    while True:
        chance.shuffle(these)
        yield from these
