"""Which blocks an engine should hold, guessed from where prompts were sent: for engines that publish no events.

An engine is taken for an LRU of block keys that keeps what it was sent, up to its KV capacity and for a lifetime. A
prompt's keys are touched deepest first, as an engine frees them: what has to go, by age or for room, goes tail first.
So whenever a block is kept, all those before it are.

Keys chain: where two prompts have the same key, they are the same up to there. So what an engine was sent is a tree,
and blocks that were always sent together are one node of it, a *run*: a prompt touches a few runs, however long it is,
whether two runs are the same is seen at their ends, and a kept block takes 8 bytes.

`now` never goes back; one that does counts as the latest seen.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.words import EngineId

ESTIMATE_PROFILE = HashProfile(Algorithm.XXHASH_CBOR, "kvatlas-estimate", 64, ExtraKeys.LORA_NAME)
"""Names blocks where an engine's own profile is not known: routers make keys with it, shards note and find them."""


class RoutingHistory:
    """`blocks_max`: per engine, where its capacity is not known. Not bounded in engines: `forget` those that leave."""

    def __init__(self, *, lifetime_s: float, blocks_max: int) -> None:
        self._lifetime_s = lifetime_s
        self._blocks_max = blocks_max
        self._engines: dict[EngineId, _Sent] = {}
        self._begun: Begun = {}
        self._latest = 0.0

    def __len__(self) -> int:
        """Blocks of all engines, those whose lifetime is over included until they are come across."""
        return sum(sent.blocks for sent in self._engines.values())

    def note(self, engine: EngineId, keys: Sequence[int], now: float, capacity: int | None = None) -> None:
        """A prompt was sent to `engine`. `keys`: uint64[n], first block first; `capacity`: of the engine, in blocks."""
        now = self._latest = max(now, self._latest)
        most = self._blocks_max if capacity is None else capacity
        sent = self._engines.get(engine)
        if sent is None:
            sent = self._engines[engine] = _Sent(engine, self._begun)
        sent.touch(keys[:most], now)
        sent.drop(sent.blocks - most)
        sent.expire(now - self._lifetime_s)

    def leading(self, keys: Sequence[int] | np.ndarray[Any, Any], now: float) -> dict[EngineId, int]:
        """How many leading blocks of the prompt each engine should hold; only engines that should hold any."""
        if len(keys) == 0:
            return {}
        now = self._latest = max(now, self._latest)
        horizon, first = now - self._lifetime_s, int(keys[0])
        begun: list[tuple[EngineId, _Run]] = []
        for engine, sent in list(self._begun.get(first, {}).items()):
            if sent.oldest < horizon:
                sent.expire(horizon)
            if (run := sent.root.next.get(first)) is not None:
                begun.append((engine, run))
        if not begun:
            return {}
        asked = keys.tolist() if isinstance(keys, np.ndarray) else keys
        known = frozenset(asked)
        return {engine: _leading(run, asked, known) for engine, run in begun}

    def forget(self, engine: EngineId) -> None:
        """Its cache was cleared, or it left."""
        if (sent := self._engines.pop(engine, None)) is not None:
            sent.forget()


class _Run:
    """Blocks that follow each other and were last sent at the same time; `follows` is what comes before them.

    `keys` are the last block's first: so the bisection of `_same` finds what it asks about in order, and runs in C.
    """

    __slots__ = ("follows", "keys", "next", "when")

    def __init__(self, keys: array[int], follows: _Run | None) -> None:
        self.keys = keys
        self.follows = follows
        self.next: dict[int, _Run] = {}  # by their first keys
        self.when = 0.0


Begun = dict[int, "dict[EngineId, _Sent]"]
"""Engines by the first block of what they were sent: most prompts begin like none that was sent lately."""


class _Sent:
    """What one engine was sent. `begun`: of all engines, kept up to date."""

    def __init__(self, engine: EngineId, begun: Begun) -> None:
        self._engine = engine
        self._begun = begun
        self.blocks = 0
        self.oldest = float("inf")  # no run was last sent before then
        self.root = _Run(array("Q"), None)
        self._runs: OrderedDict[_Run, None] = (
            OrderedDict()
        )  # sent the longest ago first, and tails before what they follow

    def touch(self, keys: Sequence[int], now: float) -> None:
        path: list[_Run] = []
        run, at = self.root, 0
        while at < len(keys):
            following = run.next.get(keys[at])
            if following is None:
                following = run.next[keys[at]] = _Run(array("Q", keys[: at - 1 if at else None : -1]), run)
                if not at:
                    self._begun.setdefault(keys[0], {})[self._engine] = self
                self.blocks += len(following.keys)
            elif not _is_whole(following, keys, at):
                following = _split(following, _same(following, frozenset(keys), len(keys) - at))
            path.append(following)
            at += len(following.keys)
            run = following
        for number in range(len(path) - 1, 0, -1):
            if len(path[number - 1].next) == 1:  # always sent together from now on, until something shows otherwise
                self._runs.pop(path[number], None)
                _join(path[number - 1], path.pop(number))
        for run in reversed(path):
            run.when = now
            self._runs[run] = None
            self._runs.move_to_end(run)
        self.oldest = min(self.oldest, now)

    def drop(self, blocks: int) -> None:
        """So many, those sent the longest ago."""
        while blocks > 0:
            oldest = next(iter(self._runs))
            if len(oldest.keys) > blocks:
                del oldest.keys[:blocks]
                self.blocks -= blocks
                return
            blocks -= len(oldest.keys)
            self._remove(oldest)

    def expire(self, horizon: float) -> None:
        """What was last sent before then."""
        while self._runs and (oldest := next(iter(self._runs))).when < horizon:
            self._remove(oldest)
        self.oldest = next(iter(self._runs)).when if self._runs else float("inf")

    def _remove(self, run: _Run) -> None:
        assert run.follows is not None
        del run.follows.next[run.keys[-1]]
        del self._runs[run]
        self.blocks -= len(run.keys)
        if run.follows is self.root:
            self._ended(run.keys[-1])

    def forget(self) -> None:
        for first in self.root.next:
            self._ended(first)

    def _ended(self, first: int) -> None:
        """Nothing that begins with that block is kept any more."""
        engines = self._begun[first]
        del engines[self._engine]
        if not engines:
            del self._begun[first]


def _leading(run: _Run, keys: Sequence[int], known: frozenset[int]) -> int:
    """How many blocks of the prompt are kept, where the first is in `run`; `known`: all of the prompt.

    In one piece, because it is called for every engine of every lookup.
    """
    at, total = 0, len(keys)
    while True:
        held = run.keys
        end = at + len(held)
        if end > total or held[0] != keys[end - 1]:  # as `_is_whole`
            low = max(end - total, 0)
            return end - bisect_left(held, True, low, len(held), key=known.__contains__)  # as `_same`
        at = end
        following = run.next.get(keys[at]) if at < total else None
        if following is None:
            return at
        run = following


def _is_whole(run: _Run, keys: Sequence[int], at: int) -> bool:
    """Whether all of the run is in the prompt, from `at` on where its first block is."""
    end = at + len(run.keys)
    return end <= len(keys) and run.keys[0] == keys[end - 1]


def _same(run: _Run, known: frozenset[int], most: int) -> int:
    """How many of the first blocks of the run are the prompt's, `most` at most."""
    total = len(run.keys)
    return total - bisect_left(run.keys, True, max(total - most, 0), total, key=known.__contains__)


def _split(run: _Run, blocks: int) -> _Run:
    """The first blocks of a run, as a run of their own which the rest follows. The rest is as old as it was."""
    first = _Run(run.keys[-blocks:], run.follows)
    assert run.follows is not None
    run.follows.next[run.keys[-1]] = first
    del run.keys[-blocks:]
    run.follows = first
    first.next[run.keys[-1]] = run
    return first


def _join(run: _Run, only: _Run) -> None:
    """Makes one run of two, where nothing else follows the first."""
    run.keys = only.keys + run.keys
    run.next = only.next
    for following in run.next.values():
        following.follows = run
