"""From a request to a choice: render and tokenise, make the keys, look them up, weigh the engines.

Every step may fail, and none of the failures fails the request: the choice is then made by affinity, with the failure
as its cause. What is looked up is the fleet at one moment; a `Decision` holds all that was learnt, for the forwarder,
the log, the observers and `/debug/route` alike.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from kvatlas_common.fleet import EngineView, Fleet, Health, Sync
from kvatlas_common.logs import LimitedLog
from kvatlas_common.matching import MatchAnswer
from kvatlas_router.adapters.index_client import LookupFailed
from kvatlas_router.core.body import Body
from kvatlas_router.core.choice import (
    Candidate,
    Choice,
    NoEngine,
    Policy,
    by_affinity,
    by_chance,
    by_cost,
    by_load,
    by_turn,
)
from kvatlas_router.core.homes import ResponseHomes
from kvatlas_router.core.ledger import Ledger
from kvatlas_router.core.outliers import Outliers
from kvatlas_router.core.prompt import Keys, NoTokens, Prompt
from kvatlas_router.core.slow_start import SlowStart

BYTES_PER_TOKEN = 4  # of a body that was not tokenised: good enough to weigh it


class Lookup(StrEnum):
    """What can be known of a request on some path."""

    PROMPT = "prompt"  # it holds a prompt whose cached prefix matters
    SESSION = "session"  # it belongs to a conversation, but has no prompt to render
    NONE = "none"  # any engine will do


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as choosing is concerned. `session`: its session header, if any."""

    path: str
    lookup: Lookup
    body: Body
    session: str | None = None

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

    async def match(self, model: str, prompts: Mapping[str, Keys]) -> MatchAnswer: ...


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
    choice: Choice
    learnt: Learnt
    pinned: frozenset[str]

    @property
    def comparable(self) -> bool:
        """Whether the engine's cached tokens may be held against the prediction."""
        prompt = self.learnt.prompt
        return prompt is not None and prompt.complete and prompt.comparable


@dataclass(frozen=True, slots=True)
class Decider:
    """`fleet` and `clock` are asked at every decision; `chance` draws from [0, 1)."""

    fleet: Callable[[], Fleet]
    tokens: Tokens
    index: Index
    ledger: Ledger
    outliers: Outliers
    slow_start: SlowStart
    homes: ResponseHomes
    policy: Policy
    chance: Callable[[], float]
    clock: Callable[[], float]
    turns: Iterator[int]
    problems: LimitedLog

    async def decide(self, asked: Asked) -> Decision:
        """Raises `UnknownModel` and `NoEngine`."""
        fleet = self.fleet()
        model, views = serving(fleet, asked)
        learnt = Learnt()
        if self.policy is not Policy.PRECISE or asked.lookup is Lookup.NONE:
            choice = self._without_lookup(self._candidates(views), asked.estimated_tokens)
        else:
            choice = await self._by_lookup(asked, model, views, learnt)
        pinned = frozenset(e.address for e in fleet.engines if e.rank)
        return Decision(model, choice, learnt, pinned)

    async def _by_lookup(self, asked: Asked, model: str, views: Sequence[EngineView], learnt: Learnt) -> Choice:
        try:
            if asked.lookup is Lookup.SESSION:
                raise NoTokens("no-prompt")
            answer = await self._look_up(asked, model, views, learnt)
            with learnt.stage("choose"):
                return by_cost(self._candidates(views, answer, learnt.keys), learnt.prompt_tokens or 0)
        except (NoTokens, LookupFailed) as failure:
            learnt.failure, cause = str(failure), failure.cause
        except Exception as defect:
            # Whatever is wrong here is not the user's fault. The message may quote the prompt: only the place is told.
            learnt.failure, cause = _place(defect), "defect"
            self.problems.warning("defect", "decision failed", where=learnt.failure, path=asked.path)
        return self._by_affinity(asked, views, learnt, cause)

    def _by_affinity(self, asked: Asked, views: Sequence[EngineView], learnt: Learnt, cause: str) -> Choice:
        home = self.homes.of(asked.body.fields.get("previous_response_id"))
        key = asked.body.session(asked.session)
        tokens = learnt.prompt_tokens or asked.estimated_tokens
        return by_affinity(self._candidates(views), tokens, key, cause=cause, home=home)

    async def _look_up(self, asked: Asked, model: str, views: Sequence[EngineView], learnt: Learnt) -> MatchAnswer:
        if not self.index.available:
            raise LookupFailed("index-unavailable", "no indexer is up")
        with learnt.stage("tokenise"):
            learnt.prompt = await self.tokens.tokens(asked.path, asked.body, model, views)
        keys = learnt.prompt.keys
        if not any(len(k) for k in keys.values()) and all(_is_empty(v) or v.profile in keys for v in views):
            return MatchAnswer()  # not one whole block, or engines that are known to hold nothing
        if not keys:
            raise NoTokens("unknown-profile", "no engine's hash profile is known")
        with learnt.stage("match"):
            learnt.answer = await self.index.match(model, keys)
        return learnt.answer

    def _without_lookup(self, candidates: Sequence[Candidate], estimate: int) -> Choice:
        if self.policy is Policy.RANDOM:
            return by_chance(candidates, estimate, self.chance)
        if self.policy is Policy.ROUND_ROBIN:
            return by_turn(candidates, estimate, next(self.turns))
        return by_load(candidates, estimate, None)

    def _candidates(
        self, views: Sequence[EngineView], answer: MatchAnswer | None = None, profiles: Collection[str] = ()
    ) -> list[Candidate]:
        """`profiles`: those asked about; nothing is known of an engine with another one."""
        now = self.clock()
        matches = {m.engine: m for m in answer.matches} if answer else {}
        unknown = frozenset(answer.unknown) if answer else frozenset()
        return [
            Candidate(
                view=view,
                match=matches.get(view.id),
                known=answer is not None and (_is_empty(view) or (view.profile in profiles and view.id not in unknown)),
                queued_tokens=self.ledger.queued_tokens(view.id),
                in_flight=self.ledger.in_flight(view.id),
                last_used=self.ledger.last_used(view.id),
                trust=self.outliers.trust(view.id, now),
                share=self.slow_start.share(view.id, now),
            )
            for view in views
        ]


def _is_empty(view: EngineView) -> bool:
    """An engine of which every event is known, and that has stored nothing yet: so nothing shows its profile."""
    return view.profile is None and view.sync is Sync.EXACT


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def serving(fleet: Fleet, asked: Asked) -> tuple[str, tuple[EngineView, ...]]:
    """The model a request is for, and the engines that may serve it. Raises `UnknownModel` and `NoEngine`."""
    up = tuple(v for v in fleet.engines.values() if v.health is not Health.DOWN)
    model = asked.body.model or _only_model(fleet)
    views = up if asked.lookup is Lookup.SESSION else fleet.serving(model)
    if views:
        return model, views
    if up and not any(v.serves(model) for v in fleet.engines.values()):
        raise UnknownModel(model, fleet.models())
    raise NoEngine(f"no engine that serves {model!r} is up" if fleet.engines else "no engine is known")


def _only_model(fleet: Fleet) -> str:
    """A request may leave the model out where there is only one (vLLM does); of several names the first."""
    known = [v for v in fleet.engines.values() if v.models]
    shared = frozenset.intersection(*(v.models - {a.name for a in v.adapters} for v in known)) if known else frozenset()
    return min(shared, default="")
