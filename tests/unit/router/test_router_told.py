"""What is told of caches: each candidate by itself, and all of them at once, are the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.fleet import EngineView
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.candidates import Candidates, EngineState, Line
from kvatlas_router.core.told import Told

OWN, FOREIGN = "sha256_cbor/b16/tagged/seed=42", "sha256/b16/tagged/seed=1"
names = st.integers(0, 7).map(lambda n: EngineId(f"e{n}:1"))
blocks = st.integers(0, 50)


@st.composite
def matches(draw: st.DrawFn) -> EngineMatch:
    media = draw(st.dictionaries(st.sampled_from(Medium), st.integers(1, 50), max_size=3))
    held = sum(media.values())
    return EngineMatch(draw(names), held, media, True, expected=held + draw(st.sampled_from([0, 0, 7])))


views = st.builds(
    lambda name, profile, size: EngineView(name, f"http://{name}", profile=profile, block_size=size),
    names,
    st.sampled_from([OWN, FOREIGN, None]),
    st.sampled_from([None, 16, 64]),
)


@given(
    st.lists(views, unique_by=lambda view: view.id),
    st.lists(matches(), unique_by=lambda match: match.engine),
    st.one_of(st.just({}), st.dictionaries(names, blocks)),
    st.booleans(),
    st.integers(1, 3000),
)
def test_what_all_hold_is_what_each_holds(
    fleet: list[EngineView], found: list[EngineMatch], lately: dict[EngineId, int], guessed: bool, tokens: int
) -> None:
    told = Told(Ask("m", tokens, {OWN: np.array([1], np.uint64)}), MatchAnswer(tuple(found)), lately, guessed=guessed)
    states = [EngineState.of(view) for view in fleet]
    each = Candidates.of([told.candidate(state, 0.0) for state in states])
    cached_tokens, moved_s = told.held(Line.of(states))
    assert cached_tokens.tolist() == [candidate.cached_tokens for candidate in each]
    assert (np.zeros(len(fleet)) if moved_s is None else moved_s).tolist() == [c.moved_s for c in each]


def test_unknown_is_not_empty() -> None:
    """By what was asked: an engine of the ask's profile is known unless it is said that it is not."""
    known, unknown, other = (EngineView(EngineId(f"e{n}:1"), "", profile=p) for n, p in enumerate([OWN, OWN, FOREIGN]))
    ask, answer = Ask("m", 5, {OWN: np.array([1], np.uint64)}), MatchAnswer((), (unknown.id,))

    def are_known(told: Told) -> list[bool]:
        return [told.candidate(EngineState.of(view), 0.0).known for view in (known, unknown, other)]

    assert are_known(Told(ask, answer, {})) == [True, False, False]
    assert are_known(Told(ask, answer, {}, guessed=True)) == [False] * 3
    assert are_known(Told(ask, None, {})) == [False] * 3
