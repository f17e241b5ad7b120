"""Which engines a shard should own. One owner per engine address at any time; the lease and its fence see to that.

| the engine                                   | belongs to                                                     |
|----------------------------------------------|----------------------------------------------------------------|
| its events are dialled, or nobody hears it   | the live shard that wins rendezvous hashing of its address     |
| its events are listened for                  | the shard that hears them, taken from another one if need be   |
| it is in no list, and its owner is gone      | the same winner: it may have died with its owner               |

Rendezvous hashing moves only the engines of a shard that left, or those a new shard wins. An owner that no longer wins
lets go (it has written everything first), and the winner takes the free lease.
Source: Thaler and Ravishankar, 'Using name-based mappings to increase hit rates', 1998.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import xxhash

HEARD_FRESH_S = 5.0
"""A shard that heard an engine so lately is the one it is connected to."""
FORCE_INTERVAL_S = 3.0
"""Between two times one engine is taken from another shard: two shards that both hear it must not fight over it."""


@dataclass(frozen=True, slots=True)
class Lease:
    shard: str
    fence: int


ORPHANED_S = 5.0
"""An engine in no list, without an owner for so long, is nobody's: the shard it spoke to has gone, and it is silent."""
HEARD_MAX = 16_384
"""Names kept of engines that were heard; beyond, the oldest goes: names come from the network."""


class Move(Enum):
    ACQUIRE = "take the free lease"
    FORCE = "take the lease from another shard"
    RELEASE = "let go"


def winner(address: str, shards: Collection[str]) -> str | None:
    """The shard an engine falls to by rendezvous hashing; None of none."""
    return max(shards, key=lambda shard: (xxhash.xxh3_64_intdigest(f"{shard}\0{address}"), shard), default=None)


class Ownership:
    """One shard's view. `now` in seconds of any one clock."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._heard: dict[str, float] = {}
        self._forced: dict[str, float] = {}
        self._unowned: dict[str, float] = {}  # engines of the store in no list: since when they have had no owner

    def heard(self, address: str, now: float) -> None:
        """A message of a listened engine came in here."""
        self._heard.pop(address, None)
        if len(self._heard) >= HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        self._heard[address] = now

    def orphaned(self, unowned: Collection[str], now: float) -> set[str]:
        """Which of the engines that are in no list and have no owner just now are nobody's."""
        self._unowned = {address: self._unowned.get(address, now) for address in unowned}
        return {address for address, since in self._unowned.items() if now - since >= ORPHANED_S}

    def hears(self, address: str, now: float) -> bool:
        return now - self._heard.get(address, float("-inf")) < HEARD_FRESH_S

    def moves(
        self,
        *,
        wanted: Mapping[str, bool],
        leases: Mapping[str, Lease],
        live: Collection[str],
        now: float,
    ) -> dict[str, Move]:
        """`wanted`: address -> whether its events are dialled; orphans are not. `leases`: who owns what. `live`: the
        shards, this one too.

        What is in `wanted` is never unowned for longer than its winner needs to see it.
        """
        self._forget(now)
        moves: dict[str, Move] = {}
        for address in {*wanted, *self._heard, *self._owned(leases)}:
            move = self._move(address, wanted.get(address), leases.get(address), live, now)
            if move is Move.FORCE:
                self._forced[address] = now
            if move is not None:
                moves[address] = move
        return moves

    def _move(
        self, address: str, dialled: bool | None, lease: Lease | None, live: Collection[str], now: float
    ) -> Move | None:
        connected = not dialled and self.hears(address, now)
        wins = connected or (dialled is not None and winner(address, live) == self._shard)
        if lease is None:
            return Move.ACQUIRE if wins else None
        if lease.shard == self._shard:
            if dialled is None and not connected:
                return None if address in self._heard else Move.RELEASE  # listened, silent for now: its own no less
            return Move.RELEASE if dialled and not wins else None
        if connected and now - self._forced.get(address, float("-inf")) >= FORCE_INTERVAL_S:
            return Move.FORCE
        return None

    def _owned(self, leases: Mapping[str, Lease]) -> Iterable[str]:
        return (address for address, lease in leases.items() if lease.shard == self._shard)

    def _forget(self, now: float) -> None:
        for address in [a for a, at in self._forced.items() if now - at >= FORCE_INTERVAL_S]:
            del self._forced[address]
