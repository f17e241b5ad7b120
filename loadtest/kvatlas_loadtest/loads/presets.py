"""The engine that loads are simulated on, and its hash profile."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import TimeModel

BLOCK_SIZE = 64
PROFILE = HashProfile(Algorithm.SHA256_CBOR, "42", BLOCK_SIZE, ExtraKeys.TAGGED)


@dataclass(frozen=True, slots=True)
class EnginePreset:
    limits: EngineLimits
    time_model: TimeModel


REFERENCE = EnginePreset(
    EngineLimits(
        num_blocks=307_328 // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=40_960,
    ),
    TimeModel(step_s=0.014, prefill_token_s=7.5e-5, decode_sequence_s=5e-5, context_token_s=4e-8),
)
"""Qwen3-32B on two H100 (tensor parallel), as in the published benchmark. Calibrated once, on policy *random*; frozen.

- The cache is the published one, 307,328 tokens; sequences and tokens per step are vLLM's defaults for that GPU.
- A step of few sequences takes about 16 ms (the published run at 3 requests/s), a token of context what reading its KV
  takes (128 KB per GPU at two thirds of the bandwidth), so that 45 long sequences take 30 ms and 180 take 80.
- `prefill_token_s` (13,300 tokens/s) was then chosen so that *random* meets its published row on the reference
  workload: see `docs/loadtest.md` and `REFERENCE_ANSWER` in `workloads.py`. Nothing was fitted to any other policy.
"""
