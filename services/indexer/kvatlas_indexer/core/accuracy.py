"""What was predicted, held against what the engines report: the index judged by live traffic."""

from __future__ import annotations

from collections import Counter, OrderedDict

from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.words import EngineId

IN_FLIGHT_MAX = 65_536
"""Requests whose end is awaited; beyond, the oldest is given up (its router is gone)."""
ENGINES_MAX = 4096


class Accuracy:
    """Counts over the requests routers observe. A request counts when its end is comparable and the engine told."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        """Observations by kind: routed, first-token, finished."""
        self.compared = 0
        self.equal = 0
        self.predicted_tokens = 0
        self.actual_tokens = 0
        self.unreported: Counter[EngineId] = Counter()
        """Per engine: answers in a row that were predicted to hit, and told their usage but no cached tokens."""
        self._predicted: OrderedDict[str, int] = OrderedDict()

    def observe(self, observation: Observation) -> None:
        match observation:
            case Routed():
                self.seen["routed"] += 1
                self._predicted[observation.request_id] = observation.predicted_cached_tokens
                if len(self._predicted) > IN_FLIGHT_MAX:
                    self._predicted.popitem(last=False)
            case FirstToken():
                self.seen["first-token"] += 1
            case Finished():
                self.seen["finished"] += 1
                self._finish(observation)

    def _finish(self, finished: Finished) -> None:
        predicted = self._predicted.pop(finished.request_id, None)
        if predicted is None:
            return
        if finished.cached_tokens is None:
            if predicted and finished.completion_tokens and finished.outcome is Outcome.OK:
                self._unreported(finished.engine)
            return
        self.unreported.pop(finished.engine, None)
        if not finished.comparable or finished.outcome is not Outcome.OK:
            return
        self.compared += 1
        self.equal += predicted == finished.cached_tokens
        self.predicted_tokens += predicted
        self.actual_tokens += finished.cached_tokens

    def _unreported(self, engine: EngineId) -> None:
        if engine not in self.unreported and len(self.unreported) >= ENGINES_MAX:
            self.unreported.clear()  # names that nobody has: whoever is real comes again
        self.unreported[engine] += 1
