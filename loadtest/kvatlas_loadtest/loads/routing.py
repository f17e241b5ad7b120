"""One router in virtual time: the seam between the simulator and whatever decides.

The simulator says what a router knows at a moment and what becomes of its requests; a `Decider` says where a request
goes. There are two kinds: the router's own core with one of its policies, and the baselines' rules. All that depends on
the shape of the router's core is in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from kvatlas_common.fleet import EngineView, Load
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.published import Dynamo, LlmD, Smg, VllmRouter
from kvatlas_loadtest.baselines.rules import Asked, Chance, Rule, Seen
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.books import Ticket
from kvatlas_router.core.choice import Choice, NoEngine
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.outliers import Attempt, Fault
from kvatlas_router.core.plans import Plan
from kvatlas_router.core.policies import Needs, PolicyName
from kvatlas_router.core.slow_start import SlowStart

SUSPECT_S = 5.0
SLOW_START_S = 15.0
"""The router's default."""


@dataclass(slots=True)
class Flying:
    """Requests at one engine that have not been answered, as one router's books have them, or several routers'."""

    requests: int = 0
    prefill_tokens: int = 0  # what those without a first token have to compute
    blocks: int = 0  # what their prompts take

    def add(self, other: Flying) -> None:
        self.requests += other.requests
        self.prefill_tokens += other.prefill_tokens
        self.blocks += other.blocks


@dataclass(frozen=True, slots=True)
class Known:
    """What a router knows when a request comes.

    `loads`: as last scraped, and what other routers have told; `flying`: the books of all routers, as this one has
    them. `held` and `estimated` ask the index, when they are asked.
    """

    model: str
    profile: str
    views: Sequence[EngineView]
    loads: Mapping[EngineId, Load]
    flying: Mapping[EngineId, Flying]
    held: Callable[[], MatchAnswer]
    estimated: Callable[[], MatchAnswer]


@dataclass(frozen=True, slots=True)
class Decision:
    """Engines in the order they are to be tried, and why; `choice` and `ask`: as the router's core has them."""

    engines: Sequence[EngineId]
    reason: str
    cached_tokens: Mapping[EngineId, int]  # the prediction
    choice: Choice | None = None
    ask: Ask | None = None

    def to_compute(self, engine: EngineId) -> int | None:
        """Tokens, as the router's core expects them; None: a baseline has no such thing."""
        if self.choice is None:
            return None
        return next(term.to_compute for term in self.choice.terms if term.engine == engine)

    def predicted(self, engine: EngineId) -> int:
        return self.cached_tokens.get(engine, 0)


class Sent(Protocol):
    """One request at one engine, as the decider keeps its books."""

    def started(self, now: float) -> None: ...

    def ended(self, now: float, cached_tokens: int, output_tokens: int) -> None:
        """Its answer came whole."""
        ...

    def failed(self, now: float) -> None:
        """Its engine has died."""
        ...

    def close(self) -> None: ...


class Decider(Protocol):
    """The state of one router, as far as deciding goes."""

    @property
    def needs_events(self) -> bool:
        """Whether it matters what the engines say of their caches."""
        ...

    @property
    def needs_reports(self) -> bool:
        """Whether it matters, with one router, what that has told the index of its requests."""
        ...

    def choose(self, asked: Asked, known: Known, now: float) -> Decision | None:
        """None: there is no engine."""
        ...

    def sent(self, decision: Decision, engine: EngineId, now: float) -> Sent: ...

    def refused(self, engine: EngineId, now: float) -> None:
        """The engine took no connection."""
        ...


class ByCore:
    """The router's own core: a chain of policies, as `--policy` gives one."""

    def __init__(self, name: PolicyName, chance: Chance) -> None:
        self._slow_start = SlowStart(SLOW_START_S)
        self._chooser = Chooser(chance, slow_start=self._slow_start)
        self._policies = Plan.of(name).policies
        self._up: frozenset[EngineId] = frozenset()

    @property
    def needs_events(self) -> bool:
        return self._policies[0].needs is Needs.INDEX

    @property
    def needs_reports(self) -> bool:
        return self._policies[0].needs is not Needs.NOTHING

    def choose(self, asked: Asked, known: Known, now: float) -> Decision | None:
        self._see(known.views, now)
        keys = {known.profile: np.array(asked.keys, dtype=np.uint64)}
        session = (asked.session or "").encode()
        ask = Ask(known.model, asked.prompt_tokens, keys, session=session, prefix=asked.prefix.encode())
        for policy in self._policies:
            answer = {Needs.INDEX: known.held, Needs.HISTORY: known.estimated}.get(policy.needs, lambda: None)()
            try:
                choice = self._chooser.choose(
                    policy,
                    ask,
                    known.views,
                    loads=known.loads,
                    answer=answer,
                    now=now,
                )
            except NoEngine:
                return None
            if choice is not None:
                cached = {term.engine: term.cached_tokens or 0 for term in choice.terms}
                return Decision([term.engine for term in choice.terms], str(choice.reason), cached, choice, ask)
        return None

    def sent(self, decision: Decision, engine: EngineId, now: float) -> Sent:
        assert decision.choice is not None
        assert decision.ask is not None
        term = next(term for term in decision.choice.terms if term.engine == engine)
        attempt = self._chooser.outliers.sent(engine, now)
        return _AtCore(self._chooser.send(term, decision.ask, now), attempt, engine, self._slow_start)

    def refused(self, engine: EngineId, now: float) -> None:
        with self._chooser.outliers.sent(engine, now) as attempt:
            attempt.failed(Fault.CONNECT, now)

    def _see(self, views: Sequence[EngineView], now: float) -> None:
        """As the router does when its fleet has changed."""
        up = frozenset(view.id for view in views)
        if up != self._up:
            self._up = up
            for engine in self._slow_start.see(up, now):
                self._chooser.outliers.restarted(engine)


@dataclass(slots=True)
class _AtCore:
    ticket: Ticket
    attempt: Attempt
    engine: EngineId
    slow_start: SlowStart

    def started(self, now: float) -> None:
        self.ticket.started(now)
        if self.attempt.began(now):
            self.slow_start.begin(self.engine, now)

    def ended(self, now: float, cached_tokens: int, output_tokens: int) -> None:
        self.ticket.ended(now, cached_tokens, output_tokens)
        self.attempt.answered(now)

    def failed(self, now: float) -> None:
        self.attempt.failed(Fault.CUT if self.ticket.first_token_s is not None else Fault.RESET, now)

    def close(self) -> None:
        self.ticket.close()
        self.attempt.close()


class ByRule:
    """A baseline. An engine that has just failed a request goes last, as with the router itself."""

    def __init__(self, rule: Rule, chance: Chance) -> None:
        self.rule = rule
        self._chance = chance
        self._suspect_until: dict[EngineId, float] = {}

    @property
    def needs_events(self) -> bool:
        return self.rule.needs_index

    @property
    def needs_reports(self) -> bool:
        return False

    def choose(self, asked: Asked, known: Known, now: float) -> Decision | None:
        if not known.views:
            return None
        matches = known.held().matches if self.rule.needs_index else ()
        cached = {match.engine: match.blocks * asked.block_size for match in matches}
        seen = [_seen(view.id, known, cached.get(view.id, 0)) for view in known.views]
        ranked = self.rule.rank(asked, seen, self._chance)
        ranked.sort(key=lambda engine: now < self._suspect_until.get(engine, 0.0))
        return Decision(ranked, type(self.rule).__name__, cached)

    def sent(self, decision: Decision, engine: EngineId, now: float) -> Sent:
        return _AtRule(self, engine)

    def refused(self, engine: EngineId, now: float) -> None:
        self._suspect_until[engine] = now + SUSPECT_S


@dataclass(slots=True)
class _AtRule:
    rule: ByRule
    engine: EngineId

    def started(self, now: float) -> None:
        pass

    def ended(self, now: float, cached_tokens: int, output_tokens: int) -> None:
        pass

    def failed(self, now: float) -> None:
        self.rule.refused(self.engine, now)

    def close(self) -> None:
        pass


def _seen(engine: EngineId, known: Known, cached: int) -> Seen:
    load, flying = known.loads[engine], known.flying[engine]
    return Seen(
        engine=engine,
        cached_tokens=cached,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        requests=flying.requests,
        prefill_tokens=flying.prefill_tokens,
        blocks=flying.blocks,
    )


_RULES: Mapping[str, Callable[[], Rule]] = {
    "llm-d": LlmD,
    "dynamo": Dynamo,
    "vllm-router": VllmRouter,
    "smg": Smg,
}

POLICIES = (*PolicyName, *_RULES)


def decider(policy: str, chance: Chance) -> Decider:
    """A fresh router's state. `policy` may give a baseline's parameters: `llm-d:prefix=5:queue=1`.

    Raises `ValueError` that says which policies and parameters there are.
    """
    name, *given = policy.split(":")
    if name in list(PolicyName) and not given:
        return ByCore(PolicyName(name), chance)
    if name not in _RULES:
        raise ValueError(f"policy {policy!r} is none of {', '.join(POLICIES)}")
    rule = _RULES[name]()
    parameters = [f.name for f in fields(rule)]  # type: ignore[arg-type]
    for text in given:
        key, _, value = text.partition("=")
        if key not in parameters:
            raise ValueError(f"policy {name} has no parameter {key!r}; it has {', '.join(parameters) or 'none'}")
        setattr(rule, key, type(getattr(rule, key))(value))
    return ByRule(rule, chance)
