"""One router in virtual time: the seam between the simulator and whatever decides.

The simulator says what a router knows at a moment and what becomes of its requests; a `Decider` says where a request
goes. There are two kinds: the router's own core, and the baselines' rules. Everything that depends on the shape of the
router's core is in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from kvatlas_common.fleet import EngineView
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.blind import BoundedHash, LeastLoad, PowerOfTwo, Random, RoundRobin, Session
from kvatlas_loadtest.baselines.published import Dynamo, LlmD, Smg, VllmRouter
from kvatlas_loadtest.baselines.rules import Asked, Chance, Rule, Seen
from kvatlas_loadtest.loads.virtual_engine import EngineLoad
from kvatlas_router.core.choice import Candidate, by_cost
from kvatlas_router.core.ledger import Ledger, Ticket

SUSPECT_S = 5.0


@dataclass(slots=True)
class InFlight:
    """Requests at one engine that have not been answered, as one router's books have them, or several routers'."""

    requests: int = 0
    prefilling: int = 0  # of them without a first token
    prefill_tokens: int = 0  # what those have to compute
    blocks: int = 0  # what their prompts take

    def add(self, other: InFlight, sign: int = 1) -> None:
        self.requests += sign * other.requests
        self.prefilling += sign * other.prefilling
        self.prefill_tokens += sign * other.prefill_tokens
        self.blocks += sign * other.blocks


@dataclass(frozen=True, slots=True)
class Known:
    """What a router knows when a request comes. `loads` as last scraped; `others`: other routers' requests."""

    views: Sequence[EngineView]
    loads: Mapping[EngineId, EngineLoad]
    own: Mapping[EngineId, InFlight]
    others: Mapping[EngineId, InFlight]
    answer: MatchAnswer | None

    def cached_tokens(self, asked: Asked) -> dict[EngineId, int]:
        matches = self.answer.matches if self.answer else ()
        return {match.engine: match.blocks * asked.block_size for match in matches}


@dataclass(frozen=True, slots=True)
class Decision:
    """Engines in the order they are to be tried, and why."""

    engines: Sequence[EngineId]
    reason: str


class Sent(Protocol):
    """One request at one engine, as the decider keeps its books."""

    def started(self, now: float) -> None: ...

    def close(self, now: float, cached_tokens: int) -> None: ...


class Decider(Protocol):
    """The state of one router, as far as deciding goes."""

    @property
    def needs_index(self) -> bool: ...

    def choose(self, asked: Asked, known: Known, now: float) -> Decision: ...

    def sent(self, asked: Asked, engine: EngineId, uncached: int, now: float) -> Sent: ...

    def failed(self, engine: EngineId, now: float) -> None:
        """It has refused or cut a request."""
        ...


class ByRule:
    """A baseline. An engine that has just failed a request goes last, as with the router itself."""

    def __init__(self, rule: Rule, chance: Chance) -> None:
        self._rule = rule
        self._chance = chance
        self._suspect_until: dict[EngineId, float] = {}

    @property
    def needs_index(self) -> bool:
        return self._rule.needs_index

    def choose(self, asked: Asked, known: Known, now: float) -> Decision:
        cached = known.cached_tokens(asked)
        seen = [_seen(view.id, known, cached.get(view.id, 0)) for view in known.views]
        ranked = self._rule.rank(asked, seen, now, self._chance)
        ranked.sort(key=lambda engine: now < self._suspect_until.get(engine, 0.0))
        return Decision(ranked, type(self._rule).__name__)

    def sent(self, asked: Asked, engine: EngineId, uncached: int, now: float) -> Sent:
        self._rule.sent(asked, engine, now)
        return _NOTHING_KEPT

    def failed(self, engine: EngineId, now: float) -> None:
        self._suspect_until[engine] = now + SUSPECT_S


class _NothingKept:
    def started(self, now: float) -> None:
        pass

    def close(self, now: float, cached_tokens: int) -> None:
        pass


_NOTHING_KEPT = _NothingKept()


class Precise:
    """The router's own core."""

    needs_index = True

    def __init__(self) -> None:
        self._ledger = Ledger()

    def choose(self, asked: Asked, known: Known, now: float) -> Decision:
        answer = known.answer or MatchAnswer()
        matches = {match.engine: match for match in answer.matches}
        candidates = [
            Candidate(
                view=view,
                match=matches.get(view.id),
                known=view.id not in answer.unknown,
                queued_tokens=self._ledger.queued_tokens(view.id) + known.others[view.id].prefill_tokens,
                in_flight=self._ledger.in_flight(view.id) + known.others[view.id].requests,
                last_used=self._ledger.last_used(view.id),
                suspect=self._ledger.is_suspect(view.id, now),
            )
            for view in known.views
        ]
        choice = by_cost(candidates, asked.prompt_tokens)
        return Decision([term.engine for term in choice.terms], str(choice.reason))

    def sent(self, asked: Asked, engine: EngineId, uncached: int, now: float) -> Sent:
        return _OnLedger(self._ledger.enter(engine, uncached, now))

    def failed(self, engine: EngineId, now: float) -> None:
        self._ledger.suspect(engine, now + SUSPECT_S)


@dataclass(slots=True)
class _OnLedger:
    ticket: Ticket

    def started(self, now: float) -> None:
        self.ticket.started()

    def close(self, now: float, cached_tokens: int) -> None:
        self.ticket.close()


def _seen(engine: EngineId, known: Known, cached: int) -> Seen:
    load, own, others = known.loads[engine], known.own[engine], known.others[engine]
    return Seen(
        engine=engine,
        cached_tokens=cached,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        requests=own.requests + others.requests,
        prefill_tokens=own.prefill_tokens + others.prefill_tokens,
        blocks=own.blocks + others.blocks,
    )


_RULES: Mapping[str, Callable[[], Rule]] = {
    "random": Random,
    "round-robin": RoundRobin,
    "least-load": LeastLoad,
    "power-of-two": PowerOfTwo,
    "session": Session,
    "bounded-hash": BoundedHash,
    "llm-d": LlmD,
    "dynamo": Dynamo,
    "vllm-router": VllmRouter,
    "smg": Smg,
}

POLICIES = ("precise", *_RULES)


def decider(policy: str, chance: Chance) -> Decider:
    """A fresh router's state. `policy` may give a baseline's parameters: `llm-d:prefix=5:queue=1`.

    Raises `ValueError` that says which policies and parameters there are.
    """
    name, *given = policy.split(":")
    if name == "precise" and not given:
        return Precise()
    if name not in _RULES:
        raise ValueError(f"policy {policy!r} is none of {', '.join(POLICIES)}")
    rule = _RULES[name]()
    parameters = {f.name: f.type for f in fields(rule) if not f.name.startswith("_")}  # type: ignore[arg-type]
    for text in given:
        key, _, value = text.partition("=")
        if key not in parameters:
            raise ValueError(f"policy {name} has no parameter {key!r}; it has {', '.join(parameters) or 'none'}")
        setattr(rule, key, type(getattr(rule, key))(value))
    return ByRule(rule, chance)
