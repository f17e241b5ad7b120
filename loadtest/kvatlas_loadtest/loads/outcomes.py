"""What became of a load: one outcome per arrival, and samples of the engines' queues.

The simulator and the client on the wire write the same `Run`, so that one report reads both. All times are in seconds
from the start of the load. `to_json` and `from_json` are each other's inverse; the same run gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arrival. `cached_tokens` as the engine counts them; `error` is empty where the answer came whole."""

    arrival: int
    sent_s: float
    first_token_s: float | None
    finished_s: float | None
    engine: str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    error: str = ""
    reason: str = ""  # of the choice, as the router gives it
    retries: int = 0  # engines that failed before
    stage: int = 0  # of the arrival

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens; None where there are not two."""
        if self.first_token_s is None or self.finished_s is None or self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """The queue of one engine at a moment, true and not as scraped. `kv_usage` is 0..1."""

    at_s: float
    engine: str
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one load. `oracle_cached_tokens`: what one infinite cache of the whole fleet would have served.

    `settings`: what else it was run with, for whoever repeats it.
    """

    policy: str
    workload: str
    seed: int
    outcomes: tuple[Outcome, ...]
    samples: tuple[Sample, ...]
    oracle_cached_tokens: int
    settings: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Until the last answer ended, the drain included."""
        return max((o.finished_s for o in self.outcomes if o.finished_s is not None), default=0.0)


def to_json(run: Run) -> bytes:
    return msgspec.json.encode(run, order="deterministic")


def from_json(data: bytes) -> Run:
    """Raises `msgspec.ValidationError` that says where the data is no run."""
    return msgspec.json.decode(data, type=Run)
