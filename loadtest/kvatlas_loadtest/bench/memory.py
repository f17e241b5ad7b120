"""Memory of the index per (block, engine) in the memory store: a million blocks with one holder each, by what the
process has grown (`/proc`), everything that goes with them included.
"""

from __future__ import annotations

import gc
import time

import numpy as np

from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.index import KvIndex
from kvatlas_loadtest.bench.accounting import resident_bytes
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Prompt, first_message
from kvatlas_loadtest.bench.rows import Options, Row, at_most

ENGINES = 8
BLOCK = 16


async def rows(options: Options) -> list[Row]:
    messages = options.count(1_000_000, 10_000) // EVENT_BLOCKS
    index = KvIndex(on_finding=lambda engine, finding: None)
    engines = [EngineId(f"10.0.0.{number}:8000") for number in range(ENGINES)]
    index.on_specs([EngineSpec(str(e), f"http://{e}", events="tcp://e:5557") for e in engines], time.time())
    rng = np.random.default_rng(1)
    said = [0] * ENGINES

    def hear(number: int, payload: bytes) -> None:
        frames = [b"kv@e@m", said[number].to_bytes(8, "big"), payload]
        index.on_frames(frames, time.time(), peer=None, dialled=engines[number], port_rank=0)
        said[number] += 1

    for number in range(ENGINES):
        hear(number, first_message(BLOCK))
        hear(number, Prompt(rng, EVENT_BLOCKS, BLOCK).message(0, EVENT_BLOCKS))
    gc.collect()
    before, empty = resident_bytes(), len(index.residency)
    for message in range(messages):
        hear(message % ENGINES, Prompt(rng, EVENT_BLOCKS, BLOCK).message(0, EVENT_BLOCKS))
    gc.collect()
    held = len(index.residency) - empty
    assert held == messages * EVENT_BLOCKS
    grown = (resident_bytes() - before) / held
    return [at_most("bytes_per_holder_memory", grown, f"bytes of resident memory, {held:,} one-holder blocks", 120)]
