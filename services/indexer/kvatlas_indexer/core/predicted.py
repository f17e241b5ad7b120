"""Predicted residency: blocks of prompts that were routed and that no event has confirmed yet.

Requests that share a prefix nobody holds yet would scatter: until the first of them is computed, the index says that
nobody has it. So a routed prompt counts as held by its engine from the moment it is sent. With its first token its
blocks are computed, and events have a moment to say so; after it the index alone is believed. A request that ends
without a first token leaves nothing; nor does one that has not begun after `pending_s`.

Each request adds a whole prefix to its engine, so what an engine is expected to hold is found by bisection.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvatlas_common.matching import PromptKeys
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.words import EngineId

RequestAt = tuple[str, str]
"""Router, and the request's id there."""


@dataclass(frozen=True, slots=True)
class PredictedLimits:
    pending_s: float = 60.0  # from being routed to the first token
    confirm_s: float = 2.0  # from the first token to the events; they come within tens of milliseconds
    keys_max: int = 4_000_000  # of all requests; beyond, the oldest are given up


@dataclass(frozen=True, slots=True)
class _Expected:
    engine: EngineId
    keys: Sequence[int]
    since: float


class Predicted:
    """Not thread-safe. `now` in seconds of any one clock."""

    def __init__(self, limits: PredictedLimits | None = None) -> None:
        self._limits = limits or PredictedLimits()
        self._pending: OrderedDict[RequestAt, _Expected] = OrderedDict()  # the oldest first, both
        self._computed: OrderedDict[RequestAt, _Expected] = OrderedDict()
        self._counts: dict[EngineId, dict[int, int]] = {}  # block key -> requests that bring it
        self._keys = 0

    def __len__(self) -> int:
        """Requests whose blocks are expected."""
        return len(self._pending) + len(self._computed)

    def leading(self, prompt: PromptKeys) -> dict[EngineId, int]:
        """How many leading blocks of the prompt are expected on each engine; only engines with any."""
        if not len(prompt) or not self._counts:
            return {}
        keys = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        first, deepest_first, total = keys[0], keys[::-1], len(keys)
        return {
            engine: total - bisect_left(deepest_first, True, key=counts.__contains__)
            for engine, counts in self._counts.items()
            if first in counts
        }

    def observe(self, at: RequestAt, observation: Observation, keys: Sequence[int], now: float) -> None:
        """`keys`: of a `Routed`, those under its engine's profile."""
        match observation:
            case Routed():
                self._drop(self._pending.pop(at, None))  # tried again, maybe on another engine
                self._drop(self._computed.pop(at, None))
                self._make_room(len(keys))
                if keys:
                    self._pending[at] = self._expect(_Expected(observation.engine, keys, now))
            case FirstToken():
                self._is_computed(at, observation.engine, now)
            case Finished():
                if observation.outcome is Outcome.OK:  # it may have been too short for a first token of its own
                    self._is_computed(at, observation.engine, now)
                self._drop(self._pending.pop(at, None))

    def forget(self, engine: EngineId) -> None:
        """Its cache was cleared, or it left."""
        for requests in (self._pending, self._computed):
            for at in [at for at, expected in requests.items() if expected.engine == engine]:
                self._drop(requests.pop(at))

    def on_tick(self, now: float) -> None:
        for requests, seconds in ((self._pending, self._limits.pending_s), (self._computed, self._limits.confirm_s)):
            while requests and now - next(iter(requests.values())).since > seconds:
                self._drop(requests.popitem(last=False)[1])

    def _is_computed(self, at: RequestAt, engine: EngineId, now: float) -> None:
        expected = self._pending.get(at)
        if expected is not None and expected.engine == engine:
            del self._pending[at]
            self._computed[at] = _Expected(engine, expected.keys, now)

    def _make_room(self, keys: int) -> None:
        for requests in (self._computed, self._pending):
            while requests and self._keys + keys > self._limits.keys_max:
                self._drop(requests.popitem(last=False)[1])

    def _expect(self, expected: _Expected) -> _Expected:
        counts = self._counts.setdefault(expected.engine, {})
        for key in expected.keys:
            counts[key] = counts.get(key, 0) + 1
        self._keys += len(expected.keys)
        return expected

    def _drop(self, expected: _Expected | None) -> None:
        if expected is None:
            return
        counts = self._counts[expected.engine]
        for key in expected.keys:
            left = counts[key] - 1
            if left:
                counts[key] = left
            else:
                del counts[key]
        if not counts:
            del self._counts[expected.engine]
        self._keys -= len(expected.keys)
