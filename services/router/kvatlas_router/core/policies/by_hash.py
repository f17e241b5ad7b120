"""The same goes where the same went before, and when engines come or go only their own share moves.

Rendezvous hashing: every engine has a weight for every name, the highest wins (Thaler and Ravishankar 1998). A name
that everybody shares (a common system prompt) must not bury one engine: engines with more requests in flight than
`OVERLOAD` times the mean go last (consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2018).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from kvatlas_common.words import EngineId
from kvatlas_router.core.choice import Choice, Strategy
from kvatlas_router.core.policies.base import Needs, Situation

OVERLOAD = 1.25
OVERLOAD_SLACK = 4  # requests: too few to be a load


@dataclass(frozen=True, slots=True)
class Session:
    """By the session. The engine that keeps what the request refers to goes first, whatever its load."""

    needs: Needs = Needs.NOTHING

    def choose(self, situation: Situation) -> Choice | None:
        ask = situation.ask
        return _by_name(situation, Strategy.AFFINITY, ask.session or ask.prefix, ask.home)


@dataclass(frozen=True, slots=True)
class ConsistentHash:
    """By how the prompt begins."""

    needs: Needs = Needs.NOTHING

    def choose(self, situation: Situation) -> Choice | None:
        ask = situation.ask
        return _by_name(situation, Strategy.HASH, ask.prefix or ask.session, ask.home)


def _by_name(situation: Situation, strategy: Strategy, name: bytes, home: EngineId | None) -> Choice | None:
    if not name and home is None:
        return None
    candidates = situation.candidates
    mean = (sum(c.ahead.in_flight for c in candidates) + 1) / max(len(candidates), 1)
    limit = OVERLOAD * mean + OVERLOAD_SLACK
    return situation.ordered(
        strategy,
        ((c.view.id != home, c.ahead.in_flight > limit, -rendezvous(name, c.view.id)) for c in candidates),
    )


def rendezvous(name: bytes, engine: EngineId) -> int:
    """The weight of an engine for a name."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, salt=_salt(engine)).digest(), "big")


@lru_cache(maxsize=16_384)
def _salt(engine: EngineId) -> bytes:
    return hashlib.blake2b(str(engine).encode(), digest_size=16).digest()
