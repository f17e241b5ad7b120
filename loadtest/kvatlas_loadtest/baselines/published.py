"""The routing rules of other projects, written anew from their public documentation, with its defaults.

All of them are given exact knowledge of the caches (this project's index), also where the original guesses: what is
compared is the rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.rules import Asked, Chance, Seen, by


@dataclass(slots=True)
class LlmD:
    """llm-d / Gateway API inference extension: a weighted sum of three scores in 0..1, highest wins.

    Prefix: matched share of the prompt's blocks. Queue: 1 for the shortest waiting queue, 0 for the longest, linear
    between (all 1 where they are equal). KV: 1 - usage. Weights 3, 2, 2: `precise-prefix-cache-aware` guide and the
    published benchmark of it; 1, 1, 1 is what the estimated mode of the same benchmark used.
    """

    prefix: float = 3.0
    queue: float = 2.0
    kv: float = 2.0
    needs_index: ClassVar[bool] = True

    def rank(self, asked: Asked, seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
        longest, shortest = max(s.waiting for s in seen), min(s.waiting for s in seen)
        blocks = max(1, asked.prompt_tokens // asked.block_size)

        def score(s: Seen) -> float:
            prefix = s.cached_tokens / asked.block_size / blocks
            queue = (longest - s.waiting) / (longest - shortest) if longest > shortest else 1.0
            return -(self.prefix * prefix + self.queue * queue + self.kv * (1.0 - s.kv_usage))

        return by(score, seen, chance)


@dataclass(slots=True)
class Dynamo:
    """NVIDIA Dynamo's KV router: `weight` x prefill blocks + decode blocks, lowest wins; both as if it went there.

    Prefill blocks: of all prompts not yet computed there, this one's uncached part included. Decode blocks: of all
    requests in flight there, this one included. Temperature 0 picks the lowest; above, softmax over the costs divided
    by their span. Source: docs.nvidia.com/dynamo, 'Routing Concepts' and 'Configuration and Tuning' (weight 1,
    temperature 0).
    """

    weight: float = 1.0
    temperature: float = 0.0
    needs_index: ClassVar[bool] = True

    def rank(self, asked: Asked, seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
        size = asked.block_size

        def cost(s: Seen) -> float:
            prefill = (s.prefill_tokens + s.uncached(asked)) / size
            return self.weight * prefill + s.blocks + asked.prompt_tokens / size

        ranked = by(cost, seen, chance)
        if self.temperature <= 0:
            return ranked
        costs = {s.engine: cost(s) for s in seen}
        span = max(costs.values()) - min(costs.values()) or 1.0
        weights = [math.exp(-costs[e] / span / self.temperature) for e in ranked]
        drawn, at = chance() * sum(weights), 0
        while at < len(weights) - 1 and drawn >= weights[at]:
            drawn -= weights[at]
            at += 1
        return [ranked[at], *ranked[:at], *ranked[at + 1 :]]


@dataclass(slots=True)
class VllmRouter:
    """vllm-router's `kv_aware`: (uncached + active prefill tokens) x (active requests + 1), lowest wins."""

    needs_index: ClassVar[bool] = True

    def rank(self, asked: Asked, seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
        return by(lambda s: (s.uncached(asked) + s.prefill_tokens) * (s.requests + 1), seen, chance)


@dataclass(slots=True)
class Smg:
    """smg's `cache_aware`: the most overlap, as long as loads are balanced; else, or below a ratio, the least loaded.

    Out of balance: the most requests in flight exceed the fewest by more than `absolute` and by more than `relative`
    times. Among equal overlaps the fewest requests win. Source: smg's documentation, 'Cache-Aware Routing' (0.3, 64,
    1.5).
    """

    threshold: float = 0.3
    absolute: int = 64
    relative: float = 1.5
    needs_index: ClassVar[bool] = True

    def rank(self, asked: Asked, seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
        most, fewest = max(s.requests for s in seen), min(s.requests for s in seen)
        unbalanced = most - fewest > self.absolute and most > self.relative * fewest
        overlap = max(s.cached_tokens for s in seen) / asked.prompt_tokens
        if unbalanced or overlap <= self.threshold:
            return by(lambda s: s.requests, seen, chance)
        return by(lambda s: -s.cached_tokens * 1e6 + s.requests, seen, chance)
