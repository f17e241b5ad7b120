"""Memory of the index per (block, engine) in the memory store: a million blocks with one holder each, by what the
process has grown (`/proc`), everything that goes with them included.
"""

from __future__ import annotations

import gc

import numpy as np

from kvatlas_loadtest.bench.accounting import resident_bytes
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Prompt
from kvatlas_loadtest.bench.in_process import InProcess
from kvatlas_loadtest.bench.rows import Options, Row, at_most

ENGINES = 8
BLOCK = 16


async def rows(options: Options) -> list[Row]:
    held, grown = filled(options.count(1_000_000, 10_000))
    unit = f"bytes of resident memory, {held:,} one-holder blocks"
    return [at_most("bytes_per_holder_memory", grown / held, unit, 120)]


def filled(blocks: int) -> tuple[int, int]:
    """Whole messages of blocks that one engine each holds, up to so many: (how many that were, bytes they took)."""
    to, rng = InProcess(ENGINES, BLOCK), np.random.default_rng(1)
    for engine in range(ENGINES):
        to.hear(engine, Prompt(rng, EVENT_BLOCKS, BLOCK).message(0, EVENT_BLOCKS))
    gc.collect()
    before, empty = resident_bytes(), len(to.index.residency)
    for message in range(blocks // EVENT_BLOCKS):
        to.hear(message % ENGINES, Prompt(rng, EVENT_BLOCKS, BLOCK).message(0, EVENT_BLOCKS))
    gc.collect()
    held = len(to.index.residency) - empty
    assert held == blocks // EVENT_BLOCKS * EVENT_BLOCKS
    return held, resident_bytes() - before
