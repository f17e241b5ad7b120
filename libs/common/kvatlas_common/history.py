"""Which blocks an engine should hold, guessed from where prompts were sent: for engines that publish no events.

An engine is taken for an LRU of block keys that keeps what it was sent, up to its KV capacity and for a lifetime. A
prompt's keys are touched deepest first, as an engine frees them: what has to go, by age or for room, goes tail first.
So whenever a block is kept, all those before it are.

`now` never goes back; one that does counts as the latest seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.words import EngineId

ESTIMATE_PROFILE = HashProfile(Algorithm.XXHASH_CBOR, "kvatlas-estimate", 64, ExtraKeys.LORA_NAME)
"""Names blocks where an engine's own profile is not known: routers make keys with it, shards note and find them."""


class RoutingHistory:
    """`blocks_max`: per engine, where its capacity is not known. Not bounded in engines: `forget` those that leave."""

    def __init__(self, *, lifetime_s: float, blocks_max: int) -> None:
        self._lifetime_s = lifetime_s
        self._blocks_max = blocks_max
        self._engines: dict[EngineId, OrderedDict[int, float]] = {}  # key -> when last sent, the longest ago first
        self._latest = 0.0

    def __len__(self) -> int:
        """Blocks of all engines, those whose lifetime is over included until they are come across."""
        return sum(map(len, self._engines.values()))

    def note(self, engine: EngineId, keys: Sequence[int], now: float, capacity: int | None = None) -> None:
        """A prompt was sent to `engine`. `keys`: uint64[n], first block first; `capacity`: of the engine, in blocks."""
        now = self._latest = max(now, self._latest)
        held = self._engines.setdefault(engine, OrderedDict())
        most = self._blocks_max if capacity is None else capacity
        touch = held.move_to_end
        for key in reversed(keys[:most]):
            held[key] = now
            touch(key)
        for _ in range(len(held) - most):
            held.popitem(last=False)
        self._expire(held, now)

    def leading(self, keys: Sequence[int], now: float) -> dict[EngineId, int]:
        """How many leading blocks of the prompt each engine should hold; only engines that should hold any."""
        if not keys:
            return {}
        now = self._latest = max(now, self._latest)
        first, deepest_first, total = keys[0], keys[::-1], len(keys)
        found = {}
        for engine, held in self._engines.items():
            self._expire(held, now)
            if first in held:
                found[engine] = total - bisect_left(deepest_first, True, key=held.__contains__)
        return found

    def forget(self, engine: EngineId) -> None:
        """Its cache was cleared, or it left."""
        self._engines.pop(engine, None)

    def _expire(self, held: OrderedDict[int, float], now: float) -> None:
        horizon = now - self._lifetime_s
        while held and next(iter(held.values())) < horizon:
            held.popitem(last=False)
