"""The engine that loads are simulated on."""

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
    TimeModel(step_s=0.018, prefill_token_s=6.5e-5, decode_sequence_s=5e-5, context_token_s=3e-8),
)
