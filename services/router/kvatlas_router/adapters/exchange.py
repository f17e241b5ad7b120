"""One request from its arrival to its last byte: what is told of it to the index, the metrics and the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_router.adapters.asgi import Headers, Request
from kvatlas_router.adapters.decide import Decision
from kvatlas_router.adapters.job import Forwarded
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.choice import BY_COST, Term

ROUTED_WITHIN_S = 0.002  # other routers should know soon what was sent where

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """A `Listener` of the forwarder. `log` lines hold sizes and names, never a prompt."""

    request: Request
    decision: Decision
    metrics: Metrics
    observe: Callable[[Observation], None]
    queued_s: float = 0.0  # before an engine had a place for it
    told: Forwarded = field(default_factory=Forwarded)
    ttft_s: float | None = None
    sent_at: float = 0.0
    _untold: Term | None = None  # where the request was sent, and the index has not been told
    _telling: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.request.decided = True

    def headers(self, term: Term) -> Headers:
        """What the router adds to an answer; all of it is fixed before the request is sent."""
        fixed = [
            (b"x-kvatlas-engine", str(term.engine).encode()),
            (b"x-kvatlas-reason", _header_safe(str(self.decision.choice.reason))),
            (b"x-request-id", self.request.id.encode()),
        ]
        if self.decision.choice.reason.strategy in BY_COST:
            fixed.append((b"x-kvatlas-cost", str(term.cost).encode()))
        if term.cached_tokens is not None:
            fixed.append((b"x-kvatlas-cached-tokens", str(term.cached_tokens).encode()))
        return fixed

    def sending(self, term: Term) -> None:
        """Nothing to tell before it is sent."""

    def sent(self, term: Term) -> None:
        """The index is told when the first byte has gone to the client, or that takes `ROUTED_WITHIN_S`: telling takes
        longer than a request that has all in the cache would have to wait for it.
        """
        self.sent_at = time.perf_counter()
        if self._untold is None:
            self._telling = asyncio.get_running_loop().call_later(ROUTED_WITHIN_S, self._tell_routed)
        self._untold = term

    def _tell_routed(self) -> None:
        term, self._untold = self._untold, None
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if term is None:
            return
        decision = self.decision
        self.observe(
            Routed(
                self.request.id,
                term.engine,
                decision.model,
                decision.ask.prompt_tokens,
                term.cached_tokens or 0,
                {profile: k.tolist() for profile, k in decision.learnt.keys.items()},
                to_compute=term.to_compute,
                silent_s=0.0 if decision.ask.streams else term.cost.ttft_ms / 1000,
            )
        )

    def retried(self, why: str) -> None:
        self.metrics.retries.labels(why).inc()

    def first_byte(self, term: Term) -> None:
        now = time.perf_counter()
        self.ttft_s = now - self.request.arrived
        self.metrics.first_byte.observe(self.ttft_s)
        self._tell_routed()
        if self.decision.ask.streams:  # of any other answer the first byte is its end
            self.observe(FirstToken(self.request.id, term.engine, self.decision.model, now - self.sent_at))

    def finished(self) -> None:
        self._tell_routed()
        told, decision, metrics = self.told, self.decision, self.metrics
        total_s = time.perf_counter() - self.request.arrived
        metrics.requests.labels(self.request.route, told.outcome).inc()
        metrics.request_seconds.labels(self.request.route).observe(total_s)
        if told.outcome is Outcome.CUT:
            metrics.cuts.inc()
        actual = told.usage.cached_tokens
        comparable = decision.comparable and told.outcome is Outcome.OK
        predicted = told.term.cached_tokens if told.term else None
        if comparable and predicted is not None and actual is not None:
            metrics.compare(decision.learnt.prompt_tokens or 0, predicted, actual)
        if told.term is not None:
            completion = told.usage.completion_tokens or 0
            self.observe(
                Finished(
                    self.request.id, told.term.engine, decision.model, actual, completion, comparable, told.outcome
                )
            )
        log.info("request handled", extra=self._line(predicted, actual, total_s))

    def _line(self, predicted: int | None, actual: int | None, total_s: float) -> dict[str, object]:
        """What each field means: docs/observing.md. Where the trace is sampled, the log adds its id."""
        told, decision = self.told, self.decision
        prompt = decision.learnt.prompt
        return {
            "request_id": self.request.id,
            "path": self.request.path,
            "model": decision.model[:128],
            "engine": str(told.term.engine) if told.term else None,
            "reason": str(decision.choice.reason),
            "cost": str(decision.choice.terms[0].cost),
            "status": told.status,
            "outcome": str(told.outcome),
            "attempts": told.attempts,
            "prompt_tokens": decision.learnt.prompt_tokens,
            "tokenised": str(prompt.where) if prompt else None,
            "predicted_cached_tokens": predicted,
            "cached_tokens": actual,
            "queued_tokens": told.term.ahead.queued_tokens if told.term else None,
            "queued_ms": round(self.queued_s * 1000, 2),
            "decision_ms": round(sum(decision.learnt.stages.values()) * 1000, 2),
            "ttft_ms": round(self.ttft_s * 1000, 2) if self.ttft_s is not None else None,
            "total_ms": round(total_s * 1000, 2),
            "error": told.error or None,
        }


def _header_safe(text: str) -> bytes:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:256]).encode()
