"""How long a simulated step takes.

One step of continuous batching costs a fixed overhead, a share per prompt token it computes (compute-bound), a share
per sequence it decodes (memory-bound: the weights are read once, each sequence adds its own work) and a share per
token of context the decoded sequences attend to. The defaults are about one large GPU serving a 32B model, fitted to
the published single-engine figures: a 10,000-token prompt takes 4.3 s to its first token, cold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes: prompt tokens, sequences decoded (one token each), and tokens of context those have."""

    prefill_tokens: int
    decode_sequences: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class TimeModel:
    """All in seconds; `speed` divides the whole: 10 is an engine ten times as fast."""

    step_s: float = 0.008
    prefill_token_s: float = 0.00042
    decode_sequence_s: float = 0.00015
    context_token_s: float = 2e-8
    speed: float = 1.0

    def __post_init__(self) -> None:
        if self.speed <= 0:
            raise ValueError(f"speed {self.speed} is not above 0; for no time at all use NO_TIME")

    def seconds(self, work: StepWork) -> float:
        """Length of the step."""
        spent = (
            self.step_s
            + work.prefill_tokens * self.prefill_token_s
            + work.decode_sequences * self.decode_sequence_s
            + work.context_tokens * self.context_token_s
        )
        return spent / self.speed


NO_TIME = TimeModel(step_s=0.0, prefill_token_s=0.0, decode_sequence_s=0.0, context_token_s=0.0)
"""Steps that take no time: an engine as fast as the machine it is simulated on."""
