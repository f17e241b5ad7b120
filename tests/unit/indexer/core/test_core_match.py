"""Matching, held against the rule of engines written down literally: try every N, take the longest."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.match import EngineGroups, GroupRule, Kind, Plan
from kvatlas_indexer.core.residency import Residency

GPU, CPU = Medium.GPU, Medium.CPU
PROMPT = list(range(1000, 1012))
FULL = GroupRule.of("full_attention", None)


def window(tokens: int) -> GroupRule:
    return GroupRule.of("sliding_window", tokens)


@dataclass(frozen=True)
class Case:
    """One engine: what was stored before a loss and after it, by (group, medium): blocks of the prompt."""

    rules: dict[int, GroupRule]
    doubtful: dict[tuple[int, Medium], frozenset[int]]
    settled: dict[tuple[int, Medium], frozenset[int]]
    block_size: int
    dropped: int

    def groups(self, engine: EngineId, residency: Residency) -> EngineGroups:
        for (group, medium), blocks in self.doubtful.items():
            residency.store(engine, group, medium, [PROMPT[i] for i in blocks])
        residency.doubt(engine, 1.0)
        for (group, medium), blocks in self.settled.items():
            residency.store(engine, group, medium, [PROMPT[i] for i in blocks])
        places = residency.places(engine)
        return EngineGroups(engine, False, places, self.rules, self.block_size, self.dropped)

    def holds(self, group: int, block: int) -> bool:
        return any(
            block in blocks for at in (self.doubtful, self.settled) for (g, _), blocks in at.items() if g == group
        )


def would_serve(case: Case, blocks: int, group: int, rule: GroupRule) -> bool:
    if rule.kind is Kind.FULL:
        return all(case.holds(group, i) for i in range(blocks))
    assert rule.window is not None
    needed = -(-(rule.window - 1) // case.block_size)
    return all(case.holds(group, i) for i in range(max(0, blocks - needed), blocks))


def naive(case: Case, length: int) -> int:
    asked = {group: rule for group, rule in case.rules.items() if rule.kind is not Kind.UNKNOWN}
    if not asked:
        return 0
    hits = [n for n in range(length + 1) if all(would_serve(case, n, g, rule) for g, rule in asked.items())]
    return max(0, max(hits) - case.dropped)


BLOCKS = st.frozensets(st.integers(0, len(PROMPT) - 1))
LEADING = st.integers(0, len(PROMPT)).map(lambda n: frozenset(range(n)))
RULES = st.one_of(st.just(FULL), st.integers(2, 40).map(window), st.just(GroupRule.of("mamba", None)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rules = draw(st.dictionaries(st.integers(0, 2), RULES, min_size=1, max_size=3))
    places = st.tuples(st.sampled_from(sorted(rules)), st.sampled_from([GPU, CPU]))
    doubtful = draw(st.dictionaries(places, st.one_of(BLOCKS, LEADING), max_size=2))
    settled = draw(st.dictionaries(places, st.one_of(BLOCKS, LEADING), max_size=4))
    return Case(rules, doubtful, settled, draw(st.sampled_from([4, 16])), draw(st.sampled_from([0, 0, 0, 1, 2])))


@settings(max_examples=150, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=4), st.integers(0, len(PROMPT)))
def test_every_engine_is_matched_by_the_rule(engines: list[Case], length: int) -> None:
    residency = Residency()
    ids = [EngineId(f"e{n}:1") for n in range(len(engines))]
    residency.store(EngineId("gone:1"), 0, GPU, PROMPT)
    plan = Plan([case.groups(engine, residency) for engine, case in zip(ids, engines, strict=True)])
    residency.clear(EngineId("gone:1"))
    found = {match.engine: match for match in plan.match(residency.masks(PROMPT[:length])).matches}
    assert {e: m.blocks for e, m in found.items()} == {
        e: hit for e, case in zip(ids, engines, strict=True) if (hit := naive(case, length))
    }
    if not plan.needs_all:
        assert plan.match(residency.leading_masks(PROMPT[:length])).matches == (*found.values(),)
    if plan.simple is not None:  # in one pass
        assert MatchAnswer(plain=plan.matched(residency.fall_outs(PROMPT[:length], plan.simple))).matches == (
            *found.values(),
        )
    for engine, case in zip(ids, engines, strict=True):
        if (match := found.get(engine)) is not None:
            assert sum(match.media.values()) == match.blocks
            assert all(match.media.values())
            assert match.doubtful == doubtful_blocks(case, match.blocks)


def doubtful_blocks(case: Case, blocks: int) -> int:
    """Blocks of the group that tells, full attention first, which only a doubtful entry of some medium vouches for."""
    asked = [g for kind in (Kind.FULL, Kind.WINDOW) for g in sorted(case.rules) if case.rules[g].kind is kind]
    told = {
        i
        for (group, medium), held in case.doubtful.items()
        if group == asked[0]
        for i in held - case.settled.get((group, medium), frozenset())
    }
    return len([i for i in told if i < blocks])


def plan_of(residency: Residency, engine: EngineId, rules: dict[int, GroupRule], *, dropped: int = 0) -> Plan:
    return Plan([EngineGroups(engine, True, residency.places(engine), rules, 16, dropped)])


E1 = EngineId("e1:1")


def test_the_nearest_medium_of_a_block_counts() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT[:3])
    residency.store(E1, 0, CPU, PROMPT[:5])
    residency.store(E1, 0, Medium.STORAGE, PROMPT[5:6])
    (match,) = plan_of(residency, E1, {0: FULL}).match(residency.masks(PROMPT)).matches
    assert match == EngineMatch(E1, 6, {GPU: 3, CPU: 2, Medium.STORAGE: 1}, exact=True)


def test_an_engine_with_sliding_windows_only_needs_the_last_blocks_only() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT[4:7])
    plan = plan_of(residency, E1, {0: window(33)})
    assert plan.needs_all
    (match,) = plan.match(residency.masks(PROMPT)).matches
    assert (match.blocks, match.media) == (7, {GPU: 7})


def test_a_window_group_that_holds_nothing_serves_nothing() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT)
    assert plan_of(residency, E1, {0: FULL, 1: window(33)}).match(residency.masks(PROMPT)) == MatchAnswer()


def test_a_second_full_attention_group_that_holds_nothing_serves_nothing() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT)
    assert plan_of(residency, E1, {0: FULL, 1: FULL}).match(residency.masks(PROMPT)) == MatchAnswer()


def test_speculative_decoding_drops_the_last_block() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT[:4])
    assert plan_of(residency, E1, {0: FULL}, dropped=1).match(residency.masks(PROMPT)).matches[0].blocks == 3
    assert plan_of(residency, E1, {0: FULL}, dropped=4).match(residency.masks(PROMPT)) == MatchAnswer()


def test_an_empty_prompt_matches_nobody() -> None:
    residency = Residency()
    residency.store(E1, 0, GPU, PROMPT)
    assert plan_of(residency, E1, {0: FULL}).match([]) == MatchAnswer()


@pytest.mark.parametrize(
    ("name", "tokens", "kind"),
    [
        (None, None, Kind.FULL),
        ("full_attention", None, Kind.FULL),
        ("mla_attention", None, Kind.FULL),
        ("sliding_window", 128, Kind.WINDOW),
        ("sliding_window", None, Kind.UNKNOWN),
        ("mamba", None, Kind.UNKNOWN),
        ("chunked_local_attention", 64, Kind.UNKNOWN),
    ],
)
def test_kinds(name: str | None, tokens: int | None, kind: Kind) -> None:
    assert GroupRule.of(name, tokens).kind is kind


@pytest.mark.parametrize(("tokens", "size", "needed"), [(256, 32, 8), (257, 32, 8), (258, 32, 9), (2, 64, 1)])
def test_blocks_needed_before_the_end_of_a_hit(tokens: int, size: int, needed: int) -> None:
    assert window(tokens).blocks_needed(size) == needed
