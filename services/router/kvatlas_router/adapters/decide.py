"""From a request to a choice: render and tokenise, make the keys, look them up, weigh the engines.

Every step may fail, and none of the failures fails the request: the choice is then made by the next policy of the
plan, with the failure as its cause. What is looked up is the fleet at one moment; a `Decision` holds all that was
learnt, for the forwarder, the log, the observers and `/debug/route` alike.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from kvatlas_common.fleet import EngineView, Fleet, Load
from kvatlas_common.logs import LimitedLog
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_router.adapters.index_client import LookupFailed
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.body import Body
from kvatlas_router.core.choice import Choice, NoEngine, Strategy
from kvatlas_router.core.homes import ResponseHomes
from kvatlas_router.core.plans import Labels, Plan, Plans
from kvatlas_router.core.policies import Needs, Policy
from kvatlas_router.core.prompt import ESTIMATE, Keys, NoTokens, Prompt

BYTES_PER_TOKEN = 4  # of a body that was not tokenised: good enough to weigh it
PREPARED_FROM = 16
"""Engines from which on a choice is prepared while the index is asked: with fewer, that costs more than it saves."""


class Lookup(StrEnum):
    """What can be known of a request on some path."""

    PROMPT = "prompt"  # it holds a prompt whose cached prefix matters
    SESSION = "session"  # it belongs to a conversation, but has no prompt to render
    NONE = "none"  # any engine will do


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came. `session`: what its session header or cookie says; `labels`: of engines it is for."""

    path: str
    lookup: Lookup
    body: Body
    session: str | None = None
    labels: Labels = ()

    @property
    def estimated_tokens(self) -> int:
        return len(self.body.raw) // BYTES_PER_TOKEN


class UnknownModel(LookupError):
    """No engine serves the model. `served`: what is served instead."""

    def __init__(self, model: str, served: Sequence[str]) -> None:
        super().__init__(model)
        self.model = model
        self.served = served


class Index(Protocol):
    @property
    def available(self) -> bool:
        """Whether asking makes sense just now."""
        ...

    async def match(self, model: str, prompts: Mapping[str, Keys], *, estimate: bool = False) -> MatchAnswer:
        """What engines hold, or with `estimate` what they should by what was sent to them. Raises `LookupFailed`."""
        ...

    def loads(self) -> Mapping[EngineId, Load]: ...


class Chooses(Protocol):
    def choose(
        self,
        policy: Policy,
        ask: Ask,
        views: Sequence[EngineView],
        *,
        loads: Mapping[EngineId, Load],
        answer: MatchAnswer | None,
        now: float,
        cause: str | None = None,
    ) -> Choice | None:
        """As `Chooser.choose`."""
        ...

    def prepare(self, views: Sequence[EngineView], loads: Mapping[EngineId, Load], now: float) -> None:
        """As `Chooser.prepare`."""
        ...


class Tokens(Protocol):
    async def tokens(self, path: str, body: Body, model: str, engines: Sequence[EngineView]) -> Prompt:
        """Raises `NoTokens`."""
        ...


@dataclass(slots=True)
class Learnt:
    """What was found out on the way to a choice. `stages` in seconds."""

    prompt: Prompt | None = None
    answer: MatchAnswer | None = None
    stages: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def keys(self) -> Mapping[str, Keys]:
        return self.prompt.keys if self.prompt else {}

    @property
    def prompt_tokens(self) -> int | None:
        return self.prompt.n_tokens if self.prompt else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Decision:
    """`pinned`: addresses with several ranks, where a request must name the one it is for."""

    model: str
    ask: Ask
    choice: Choice
    learnt: Learnt
    pinned: frozenset[str]

    @property
    def comparable(self) -> bool:
        """Whether the engine's cached tokens may be held against the prediction."""
        prompt = self.learnt.prompt
        told = self.choice.reason.strategy is Strategy.PRECISE
        return told and prompt is not None and prompt.complete and prompt.comparable


@dataclass(frozen=True, slots=True)
class Decider:
    """`fleet` and `clock` are asked at every decision."""

    fleet: Callable[[], Fleet]
    tokens: Tokens
    index: Index
    chooser: Chooses
    homes: ResponseHomes
    plans: Plans
    clock: Callable[[], float]
    problems: LimitedLog

    async def decide(self, asked: Asked) -> Decision:
        """Raises `UnknownModel` and `NoEngine`."""
        fleet = self.fleet()
        model, _, views = self.eligible(asked)
        plan = self.plans.of(model)
        inquiry = _Inquiry(self, asked, model, views, self._ask(asked, model))
        choice = await inquiry.choice(plan)
        pinned = frozenset(e.address for e in fleet.engines if e.rank)
        return Decision(model, inquiry.ask, choice, inquiry.learnt, pinned)

    def eligible(self, asked: Asked) -> tuple[str, Labels, tuple[EngineView, ...]]:
        """The model, the labels wanted, and the engines that may serve it. Raises `UnknownModel` and `NoEngine`."""
        model, views = serving(self.fleet(), asked)
        labels = (*self.plans.of(model).labels, *asked.labels)
        return model, labels, _labelled(views, labels, model)

    def _ask(self, asked: Asked, model: str) -> Ask:
        """What is known of a request at a glance."""
        return Ask(
            model,
            asked.estimated_tokens,
            home=self.homes.of(asked.body.fields.get("previous_response_id")),
            streams=asked.body.streams,
        )


class _Inquiry:
    """One request on its way to a choice: what it has cost already is not done again for the next policy."""

    def __init__(self, decider: Decider, asked: Asked, model: str, views: Sequence[EngineView], ask: Ask) -> None:
        self.ask = ask
        self.learnt = Learnt()
        self._decider = decider
        self._asked = asked
        self._model = model
        self._views = views
        self._cause: str | None = None
        self._named = False

    async def choice(self, plan: Plan) -> Choice:
        """By the first policy of the plan that has an answer. Raises `NoEngine`."""
        policies = plan.policies
        if self._asked.lookup is Lookup.NONE and policies[0].needs is not Needs.NOTHING:
            policies = policies[-1:]  # any engine will do
        for policy in policies:
            answer: MatchAnswer | None = None
            if policy.needs is not Needs.NOTHING:
                answer = await self._look_up(estimate=policy.needs is Needs.HISTORY)
                if answer is None:
                    continue
            choice = self._chosen(policy, answer)
            if choice is not None:
                return choice
            self._cause = self._cause or "unknown-engines"
        raise NoEngine("no policy has an answer")

    def _chosen(self, policy: Policy, answer: MatchAnswer | None) -> Choice | None:
        decider, now = self._decider, self._decider.clock()
        if policy.needs is Needs.NOTHING and not self._named:  # others do not go by these
            self._named, body = True, self._asked.body
            self.ask = replace(self.ask, session=body.session(self._asked.session), prefix=body.opening())
        with self.learnt.stage("choose"):
            return decider.chooser.choose(
                policy,
                self.ask,
                self._views,
                loads=decider.index.loads(),
                answer=answer,
                now=now,
                cause=self._cause,
            )

    async def _look_up(self, *, estimate: bool) -> MatchAnswer | None:
        """None: it cannot be done; why is the cause of what is done instead."""
        if self.learnt.failure:
            return None  # it would fail again
        try:
            if self._asked.lookup is Lookup.SESSION:
                raise NoTokens("no-prompt")
            return await self._answer(estimate)
        except (NoTokens, LookupFailed) as failure:
            self.learnt.failure, self._cause = str(failure), self._cause or failure.cause
        except UnknownProfile as failure:
            self._cause = str(failure)  # a guess can still be made
        except Exception as defect:
            # Whatever is wrong here is not the user's fault. The message may quote the prompt: only the place is told.
            self.learnt.failure, self._cause = _place(defect), "defect"
            self._decider.problems.warning(
                "defect", "decision failed", where=self.learnt.failure, path=self._asked.path
            )
        return None

    async def _answer(self, estimate: bool) -> MatchAnswer:
        decider, learnt = self._decider, self.learnt
        if not decider.index.available:
            raise LookupFailed("index-unavailable", "no indexer is up")
        if learnt.prompt is None:
            with learnt.stage("tokenise"):
                prompt = await decider.tokens.tokens(self._asked.path, self._asked.body, self._model, self._views)
            learnt.prompt = prompt
            self.ask = replace(self.ask, prompt_tokens=prompt.n_tokens, keys=prompt.keys)
        keys = learnt.keys if estimate else {p: k for p, k in learnt.keys.items() if p != ESTIMATE}
        if not any(len(k) for k in keys.values()) and all(v.known_empty or v.profile in keys for v in self._views):
            return MatchAnswer()  # not one whole block, or engines that are known to hold nothing
        if not keys:
            raise UnknownProfile("unknown-profile")
        with learnt.stage("match"):
            if len(self._views) >= PREPARED_FROM:
                _meanwhile(lambda: decider.chooser.prepare(self._views, decider.index.loads(), decider.clock()))
            learnt.answer = await decider.index.match(self._model, keys, estimate=estimate)
        return learnt.answer


def _meanwhile(work: Callable[[], None]) -> None:
    """Done while what is awaited next is under way: it is sent in the turn of the loop before."""
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, work)


class UnknownProfile(LookupError):
    """No engine's hash profile is known, so the index cannot be asked."""


def _labelled(views: tuple[EngineView, ...], labels: Labels, model: str) -> tuple[EngineView, ...]:
    """Raises `NoEngine` where no engine has all of the labels."""
    if not labels:
        return views
    found = tuple(view for view in views if view.labelled(labels))
    if not found:
        wanted = ", ".join(f"{name}={value}" for name, value in labels)
        raise NoEngine(f"no engine that serves {model!r} is labelled {wanted}")
    return found


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def serving(fleet: Fleet, asked: Asked) -> tuple[str, tuple[EngineView, ...]]:
    """The model a request is for, and the engines that may serve it. Raises `UnknownModel` and `NoEngine`."""
    model = asked.body.model or _only_model(fleet)
    views = fleet.up() if asked.lookup is Lookup.SESSION else fleet.serving(model)
    if views:
        return model, views
    if fleet.up() and not any(v.serves(model) for v in fleet.engines.values()):
        raise UnknownModel(model, fleet.models())
    raise NoEngine(f"no engine that serves {model!r} is up" if fleet.engines else "no engine is known")


def _only_model(fleet: Fleet) -> str:
    """A request may leave the model out where there is only one (vLLM does); of several names the first."""
    known = [v for v in fleet.engines.values() if v.models]
    shared = frozenset.intersection(*(v.models - {a.name for a in v.adapters} for v in known)) if known else frozenset()
    return min(shared, default="")
