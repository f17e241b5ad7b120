"""Memory of the index per (block, engine) in the memory store: a million blocks with one holder each, by what the
process has grown (`/proc`), everything that goes with them included.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import numpy as np

from kvatlas_loadtest.bench.accounting import resident_bytes
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, VOCABULARY, stored
from kvatlas_loadtest.bench.in_process import InProcess
from kvatlas_loadtest.bench.rows import Options, Row, at_most

ENGINES = 8
BLOCK = 16


async def rows(options: Options) -> list[Row]:
    ((held, grown),) = growth([options.count(1_000_000, 10_000)])
    unit = f"bytes of resident memory, {held:,} one-holder blocks"
    return [at_most("bytes_per_holder_memory", grown / held, unit, 120)]


def growth(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """One index grows through these sizes, in whole messages: (blocks it holds, bytes it has grown by) at each.

    All messages have the same tokens: the index keeps none.
    """
    to, rng = InProcess(ENGINES, BLOCK), np.random.default_rng(1)
    tokens = rng.integers(VOCABULARY, size=EVENT_BLOCKS * BLOCK).tolist()

    def hear(message: int) -> None:
        keys = rng.integers(2**64 - 1, size=EVENT_BLOCKS, dtype=np.uint64).tolist()
        to.hear(message % ENGINES, stored(keys, tokens, BLOCK))

    for message in range(ENGINES):
        hear(message)
    gc.collect()
    before, empty, messages = resident_bytes(), len(to.index.residency), 0
    for size in sizes:
        while messages < size // EVENT_BLOCKS:
            hear(messages)
            messages += 1
        gc.collect()
        held = len(to.index.residency) - empty
        assert held == messages * EVENT_BLOCKS
        yield held, resident_bytes() - before
