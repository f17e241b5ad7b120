"""The block keys of a prompt of 8,192 tokens that was never seen before."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_loadtest.bench.feeds import VOCABULARY, profile
from kvatlas_loadtest.bench.rows import Options, Row, at_most

TOKENS = 8192


async def rows(options: Options) -> list[Row]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(VOCABULARY, size=TOKENS, dtype=np.uint32) for _ in range(options.count(200, 5))]
    took = []
    for prompt in prompts:
        began = time.perf_counter()
        keys = prompt_keys(profile(16), prompt)
        took.append(time.perf_counter() - began)
        assert len(keys) == (TOKENS - 1) // 16
    unit = f"ms, p50 of {len(took)}, {TOKENS} tokens, sha256_cbor, block 16"
    return [at_most("hash_ms", median(took) * 1e3, unit, 3.0)]
