"""Decisions: what is looked up, and what happens when it cannot be."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvatlas_common.fleet import Adapter, EngineView, Fleet, Health, Load
from kvatlas_common.logs import LimitedLog
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.adapters.decide import PREPARED_FROM, Asked, Decider, Lookup, UnknownModel
from kvatlas_router.adapters.index_client import LookupFailed
from kvatlas_router.core.body import Body
from kvatlas_router.core.choice import NoEngine
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.homes import ResponseHomes
from kvatlas_router.core.plans import Labels, Plan, Plans
from kvatlas_router.core.policies import PolicyName
from kvatlas_router.core.prompt import ESTIMATE, Keys, NoTokens, Prompt, Where

PROFILE = "sha256_cbor/b64/tagged/seed=42"
A, B = EngineId("a:1"), EngineId("b:1")
CHAT = "/v1/chat/completions"


def view(engine: EngineId, **also: object) -> EngineView:
    known = EngineView(
        engine, f"http://{engine}", frozenset({"m"}), health=Health.READY, profile=PROFILE, block_size=64
    )
    return replace(known, **also)  # type: ignore[arg-type]


@dataclass
class Given:
    """The ports, answering what a test wants."""

    error: Exception | None = None
    keys: Mapping[str, Keys] = field(default_factory=lambda: {PROFILE: np.arange(4, dtype=np.uint64)})
    answer: MatchAnswer = field(default_factory=MatchAnswer)
    lookup_error: LookupFailed | None = None
    guess: MatchAnswer = field(default_factory=MatchAnswer)
    available: bool = True
    asked: int = 0
    lookups: list[tuple[bool, list[str]]] = field(default_factory=list)

    async def tokens(self, path: str, body: Body, model: str, engines: Sequence[EngineView]) -> Prompt:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Prompt(list(range(300)), self.keys, complete=True, comparable=True, where=Where.LOCAL)

    async def match(self, model: str, prompts: Mapping[str, Keys], *, estimate: bool = False) -> MatchAnswer:
        self.lookups.append((estimate, list(prompts)))
        if self.lookup_error is not None:
            raise self.lookup_error
        return self.guess if estimate else self.answer

    def loads(self) -> Mapping[EngineId, Load]:
        return {}


def decider(given: Given, *views: EngineView, policy: PolicyName = PolicyName.PRECISE, labels: Labels = ()) -> Decider:
    return Decider(
        fleet=lambda: Fleet.of(views),
        tokens=given,
        index=given,
        chooser=Chooser(random.Random(1).random),
        homes=ResponseHomes(),
        plans=Plans(Plan.of(policy, labels=labels)),
        clock=lambda: 0.0,
        problems=LimitedLog(logging.getLogger("test"), 0.0, lambda: 0.0),
    )


def asked(raw: bytes = b'{"model": "m"}', lookup: Lookup = Lookup.PROMPT) -> Asked:
    return Asked(CHAT, lookup, Body.parse(raw))


async def test_a_match_decides() -> None:
    given = Given(answer=MatchAnswer((EngineMatch(B, 3, {Medium.GPU: 3}, True),)))
    decision = await decider(given, view(A), view(B)).decide(asked())
    assert (decision.choice.engine.id, str(decision.choice.reason)) == (B, "precise")
    assert (decision.choice.terms[0].cached_tokens, decision.choice.terms[0].to_compute) == (192, 108)
    assert decision.comparable
    assert set(decision.learnt.stages) == {"tokenise", "match", "choose"}


class Preparing(Chooser):
    """Says when it is asked to prepare a choice."""

    def __init__(self) -> None:
        super().__init__(random.Random(1).random)
        self.prepared = asyncio.Event()

    def prepare(self, views: Sequence[EngineView], loads: Mapping[EngineId, Load], now: float) -> None:
        super().prepare(views, loads, now)
        self.prepared.set()


async def test_the_choice_is_prepared_while_the_index_is_asked() -> None:
    chooser = Preparing()

    class Waits(Given):
        async def match(self, model: str, prompts: Mapping[str, Keys], *, estimate: bool = False) -> MatchAnswer:
            assert not chooser.prepared.is_set()
            async with asyncio.timeout(30):
                await chooser.prepared.wait()
            return MatchAnswer((EngineMatch(B, 3, {Medium.GPU: 3}, True),))

    others = [view(EngineId(f"10.0.1.{n}:8000")) for n in range(PREPARED_FROM)]
    decision = await replace(decider(Waits(), view(B), *others), chooser=chooser).decide(asked())
    assert decision.choice.engine.id == B


async def test_a_choice_among_few_is_not_worth_preparing() -> None:
    chooser = Preparing()
    await replace(decider(Given(), view(A), view(B)), chooser=chooser).decide(asked())
    assert not chooser.prepared.is_set()


async def test_an_engine_whose_profile_was_not_asked_about_is_unknown() -> None:
    given = Given()
    decision = await decider(given, view(A, profile=None), view(B)).decide(asked())
    assert {t.engine: t.cached_tokens for t in decision.choice.terms} == {A: None, B: 0}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Given(error=NoTokens("tokenizer")), "affinity:tokenizer"),
        (Given(error=NoTokens("unrenderable:audio")), "affinity:unrenderable:audio"),
        (Given(lookup_error=LookupFailed("deadline")), "affinity:deadline"),
        (Given(keys={}), "affinity:unknown-profile"),
        (Given(keys={ESTIMATE: np.arange(4, dtype=np.uint64)}), "estimate:unknown-profile"),
        (Given(available=False), "affinity:index-unavailable"),
        (Given(error=RuntimeError("the user said: SECRET")), "affinity:defect"),
        (Given(answer=MatchAnswer(unknown=(A, B))), "estimate:unknown-engines"),
    ],
)
async def test_no_failure_fails_a_request(given: Given, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    decision = await decider(given, view(A), view(B)).decide(asked())
    assert str(decision.choice.reason) == reason
    assert len(decision.choice.terms) == 2
    assert "SECRET" not in repr([vars(r) for r in caplog.records]) + decision.learnt.failure


async def test_with_no_indexer_up_nothing_is_tokenised() -> None:
    given = Given(available=False)
    await decider(given, view(A)).decide(asked())
    assert given.asked == 0


@pytest.mark.parametrize("policy", [p for p in PolicyName if p not in (PolicyName.PRECISE, PolicyName.ESTIMATE)])
async def test_other_policies_look_nothing_up(policy: PolicyName) -> None:
    given = Given()
    decision = await decider(given, view(A), view(B), policy=policy).decide(asked())
    assert given.asked == 0
    assert decision.choice.reason.cause is None
    assert all(t.cached_tokens is None for t in decision.choice.terms)


async def test_who_serves_a_model() -> None:
    fleet = view(A), view(B, models=frozenset({"other"}))
    assert (await decider(Given(), *fleet).decide(asked())).choice.engine.id == A
    with pytest.raises(UnknownModel) as unknown:
        await decider(Given(), *fleet).decide(asked(b'{"model": "none"}'))
    assert list(unknown.value.served) == ["m", "other"]
    with pytest.raises(NoEngine):
        await decider(Given(), view(A, health=Health.DOWN)).decide(asked())
    with pytest.raises(NoEngine):
        await decider(Given()).decide(asked())


async def test_a_model_served_only_by_engines_that_are_down_is_not_unknown() -> None:
    fleet = view(A, health=Health.DOWN), view(B, models=frozenset({"other"}))
    with pytest.raises(NoEngine):
        await decider(Given(), *fleet).decide(asked())


async def test_a_request_may_leave_out_the_only_model() -> None:
    fleet = view(A, models=frozenset({"m", "lora"}), adapters=(Adapter("lora"),)), view(B)
    assert (await decider(Given(), *fleet).decide(asked(b"{}"))).model == "m"
    with pytest.raises(UnknownModel):
        await decider(Given(), view(A), view(B, models=frozenset({"other"}))).decide(asked(b"{}"))


async def test_the_home_of_a_response_goes_first() -> None:
    made = decider(Given(error=NoTokens("unrenderable:previous_response_id")), view(A), view(B))
    for engine in (A, B):
        made.homes.remember("resp_1", engine)
        decision = await made.decide(asked(b'{"model": "m", "previous_response_id": "resp_1"}'))
        assert decision.choice.engine.id == engine


async def test_addresses_with_several_ranks_are_pinned() -> None:
    decision = await decider(Given(), view(A), view(EngineId("a:1", 1)), view(B)).decide(asked())
    assert decision.pinned == {"a:1"}


async def test_a_lookup_that_failed_is_not_asked_again_as_a_guess() -> None:
    given = Given(lookup_error=LookupFailed("deadline"))
    await decider(given, view(A)).decide(asked())
    assert given.lookups == [(False, [PROFILE])]


async def test_a_guess_is_asked_for_with_keys_of_our_own_where_an_engine_has_none() -> None:
    keys = {PROFILE: np.arange(4, dtype=np.uint64), ESTIMATE: np.arange(4, 8, dtype=np.uint64)}
    given = Given(
        keys=keys,
        answer=MatchAnswer(unknown=(A, B)),
        guess=MatchAnswer((EngineMatch(B, 2, {}, False),)),
    )
    decision = await decider(given, view(A), view(B, profile=None, block_size=None)).decide(asked())
    assert given.lookups == [(False, [PROFILE]), (True, [PROFILE, ESTIMATE])]
    assert (decision.choice.engine.id, str(decision.choice.reason)) == (B, "estimate:unknown-engines")
    assert decision.choice.terms[0].cached_tokens == 128
    assert not decision.comparable


async def test_only_engines_with_the_labels_are_considered() -> None:
    fleet = view(A, labels=(("task", "chat"),)), view(B, labels=(("task", "batch"), ("tier", "gold")))
    by_model = decider(Given(), *fleet, labels=(("task", "batch"),))
    assert (await by_model.decide(asked())).choice.engine.id == B
    by_request = Asked(CHAT, Lookup.PROMPT, Body.parse(b'{"model": "m"}'), labels=(("task", "chat"),))
    assert (await decider(Given(), *fleet).decide(by_request)).choice.engine.id == A
    with pytest.raises(NoEngine, match="task=batch, task=chat"):
        await by_model.decide(by_request)
