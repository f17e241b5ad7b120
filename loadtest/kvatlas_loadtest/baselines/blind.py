"""Rules that do not look into caches: chance, turns, load, sessions, prompts."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.rules import Asked, Chance, Seen, Stateless, by


@dataclass(slots=True)
class Random(Stateless):
    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        return by(lambda s: 0, seen, chance)


@dataclass(slots=True)
class RoundRobin(Stateless):
    turn: int = 0

    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        at = self.turn % len(seen)
        self.turn += 1
        return [s.engine for s in (*seen[at:], *seen[:at])]


@dataclass(slots=True)
class LeastLoad(Stateless):
    """Fewest requests in flight, then fewest prompt tokens to compute."""

    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        return by(lambda s: s.requests + s.prefill_tokens * 1e-9, seen, chance)


@dataclass(slots=True)
class PowerOfTwo(Stateless):
    """Of two engines drawn at random, the one with fewer requests in flight (Mitzenmacher)."""

    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        shuffled = by(lambda s: 0, seen, chance)
        requests = {s.engine: s.requests for s in seen}
        drawn = sorted(shuffled[:2], key=lambda engine: requests[engine])
        return drawn + shuffled[2:]


@dataclass(slots=True)
class Session(Stateless):
    """The engine with the highest random weight for the session (rendezvous hashing); without one, the least loaded."""

    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        if asked.session is None:
            return LeastLoad().rank(asked, seen, now, chance)
        session = asked.session
        return [s.engine for s in sorted(seen, key=lambda s: _weight(session, str(s.engine)))]


@dataclass(slots=True)
class BoundedHash(Stateless):
    """Consistent hashing with bounded loads (Mirrokni et al. 2018) on the first blocks of the prompt.

    The prompt's place on a ring of `points` per engine names an engine; engines above `bound` times the mean load are
    passed over. Load is requests in flight. Source of the defaults: Envoy's ring hash and llm-d's and KubeAI's
    documentation (load factor 125 %).
    """

    blocks: int = 16
    bound: float = 1.25
    points: int = 64
    _ring: list[tuple[int, EngineId]] = field(default_factory=list)
    _of: tuple[EngineId, ...] = ()

    def rank(self, asked: Asked, seen: Sequence[Seen], now: float, chance: Chance) -> list[EngineId]:
        engines = tuple(s.engine for s in seen)
        if engines != self._of:
            self._of = engines
            self._ring = sorted((_weight(str(e), str(point)), e) for e in engines for point in range(self.points))
        requests = {s.engine: s.requests for s in seen}
        limit = self.bound * (sum(requests.values()) + 1) / len(seen)
        prefix = asked.keys[min(self.blocks, len(asked.keys)) - 1] if asked.keys else 0
        start = bisect_left(self._ring, (_weight("prompt", str(prefix)), EngineId("")))
        order = list(dict.fromkeys(e for _, e in (*self._ring[start:], *self._ring[:start])))
        return sorted(order, key=lambda engine: requests[engine] + 1 > limit)


def _weight(name: str, other: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}|{other}".encode(), digest_size=8).digest(), "big")
