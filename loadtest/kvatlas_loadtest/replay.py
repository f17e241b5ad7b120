"""Is the simulated engine equal to a real one? Feeds it a capture's requests and compares what both published.

The simulation gets the requests and the engine's options, nothing else; the captured events are read only to compare.
Requests run one at a time, their output forced to the recorded one. An event is compared by type, block keys and
medium, in order, message boundaries aside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

from kvatlas_common.blocks.extras import Lora, PromptExtras
from kvatlas_common.blocks.profile import ExtraKeys, HashProfile
from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import BlockRemoved, BlockStored, MalformedBatch
from kvatlas_common.fleet import Adapter
from kvatlas_common.words import Medium
from kvatlas_loadtest.block_pool import PoolVersion
from kvatlas_loadtest.captures import Capture, CapturedRequest, CaptureError, read_capture
from kvatlas_loadtest.hashing import PromptChain, profile_of, published_extra_keys
from kvatlas_loadtest.kv_events import KvEvent, Removed, Stored, key_of
from kvatlas_loadtest.scheduler import EngineCore, EngineLimits, EngineRequest

Compared: TypeAlias = tuple[str, tuple[int, ...], Medium | None]


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """The recorded engine's options.

    `resets`: the prefix cache was reset after these requests, numbered from 0. `max_num_batched_tokens` None: 2,048 as
    in the captures of 0.32, no chunks in those of 0.10, where `drives_cache_manager`: they come from a program that
    drives 0.10's cache manager without an engine. It computes prompts whole and the last sampled token too, and
    publishes a reset at once.
    """

    num_blocks: int
    block_size: int
    hash_algorithm: str
    hash_seed: str | None
    pool: PoolVersion
    resets: Collection[int] = ()
    max_num_batched_tokens: int | None = None
    adapters: tuple[Adapter, ...] = ()  # a request for one of them names it as its model

    @property
    def drives_cache_manager(self) -> bool:
        return self.pool is PoolVersion.V0_10

    def profile(self) -> HashProfile:
        """Raises `ValueError`."""
        extra_keys = ExtraKeys.LORA_ID if self.pool is PoolVersion.V0_10 else ExtraKeys.TAGGED
        return profile_of(self.hash_algorithm, self.hash_seed, self.block_size, extra_keys)

    def limits(self, longest: int) -> EngineLimits:
        """`longest`: tokens of the longest request, prompt and output."""
        chunk = longest if self.drives_cache_manager else 2048
        return EngineLimits(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            version=self.pool,
            max_num_batched_tokens=self.max_num_batched_tokens or chunk,
            max_model_len=longest,
            computes_last_token=self.drives_cache_manager,
        )


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """`differences`: positions of the event sequence at which the two differ, the longer one's surplus included."""

    events_real: int
    events_simulated: int
    differences: int
    cached_mismatches: int
    first_difference: str = ""

    @property
    def equal(self) -> bool:
        return not self.differences and not self.cached_mismatches

    def as_json(self) -> dict[str, int]:
        return {
            "events_real": self.events_real,
            "events_simulated": self.events_simulated,
            "differences": self.differences,
            "cached_mismatches": self.cached_mismatches,
        }


def replay(folder: Path, options: ReplayOptions) -> ReplayReport:
    """Raises `CaptureError` for a capture that cannot be read, `ValueError` for options that fit no engine."""
    capture = read_capture(folder)
    real = list(_real_events(capture))
    simulated, cached = simulate(capture.requests, options)
    wrong = [(i, r, s) for i, (r, s) in enumerate(zip_longest(real, simulated)) if r != s]
    return ReplayReport(
        events_real=len(real),
        events_simulated=len(simulated),
        differences=len(wrong),
        cached_mismatches=sum(c != r.cached_tokens for c, r in zip(cached, capture.requests, strict=True)),
        first_difference=f"event {wrong[0][0]}: captured {wrong[0][1]}, simulated {wrong[0][2]}" if wrong else "",
    )


def simulate(requests: Collection[CapturedRequest], options: ReplayOptions) -> tuple[list[Compared], list[int]]:
    """The events the simulated engine publishes for these requests, and the cached tokens of each."""
    profile = options.profile()
    longest = max((len(r.prompt_token_ids) + len(r.output_token_ids) for r in requests), default=1)
    core = EngineCore(options.limits(longest))
    events: list[Compared] = []
    cached: list[int] = []
    for number, captured in enumerate(requests):
        request = _forced(str(number), captured, profile, options.adapters)
        core.add(request)
        while step := core.schedule():
            events += map(_compared, core.complete(step).events)
        assert request.cached_tokens is not None
        cached.append(request.cached_tokens)
        if number in options.resets:
            core.reset()
            if options.drives_cache_manager:
                events += map(_compared, core.take_events())
    return events, cached


def _forced(name: str, captured: CapturedRequest, profile: HashProfile, adapters: Collection[Adapter]) -> EngineRequest:
    lora = next((Lora(a.name, a.number, a.path) for a in adapters if a.name == captured.body.get("model")), None)
    extras = PromptExtras(lora, captured.cache_salt)
    first_extra_keys, extra_keys = published_extra_keys(extras)
    return EngineRequest(
        id=name,
        prompt=captured.prompt_token_ids,
        max_tokens=len(captured.output_token_ids),
        chain=PromptChain(profile, extras),
        sample=captured.output_token_ids.__getitem__,
        first_extra_keys=first_extra_keys,
        extra_keys=extra_keys,
    )


def _compared(event: KvEvent) -> Compared:
    if isinstance(event, Stored):
        return "BlockStored", tuple(map(key_of, event.hashes)), Medium.GPU
    if isinstance(event, Removed):
        return "BlockRemoved", (key_of(event.hash),), Medium.GPU
    return "AllBlocksCleared", (), None


def _real_events(capture: Capture) -> Iterator[Compared]:
    for number, payload in enumerate(capture.payloads):
        try:
            batch = decode_batch(payload)
        except MalformedBatch as error:
            raise CaptureError(f"event message {number}: {error}") from None
        for rejected in batch.rejected:
            yield f"rejected: {rejected.why}", (), None
        for event in batch.events:
            if isinstance(event, BlockStored | BlockRemoved):
                yield type(event).__name__, tuple(event.keys), event.medium
            else:
                yield "AllBlocksCleared", (), None
