"""An answer in columns is the same answer as one with a match for each engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.matching import EngineMatch, MatchAnswer, PlainMatches
from kvatlas_common.words import EngineId, Medium

ENGINES = [EngineId(f"e{n}:1") for n in range(6)]
plain = st.dictionaries(st.sampled_from(ENGINES[:4]), st.tuples(st.integers(1, 9), st.booleans())).map(
    lambda found: PlainMatches(list(found), [blocks for blocks, _ in found.values()], [e for _, e in found.values()])
)
listed = st.dictionaries(st.sampled_from(ENGINES[4:]), st.integers(0, 9)).map(
    lambda found: tuple(EngineMatch(e, n, {Medium.CPU: n}, True, 0, n) for e, n in found.items())
)
answers = st.builds(MatchAnswer, listed, st.just((EngineId("gone:1"),)), plain)


@given(answers)
def test_either_way_of_writing_it(answer: MatchAnswer) -> None:
    one_by_one = MatchAnswer(answer.matches, answer.unknown)
    assert answer == one_by_one
    assert answer.found == one_by_one.found == bool(answer.matches)
    assert answer.blocks() == one_by_one.blocks() == {match.engine: match.blocks for match in answer.matches}
    assert answer.among(ENGINES[:2]) == one_by_one.among(ENGINES[:2])
    assert answer != MatchAnswer(answer.matches)


@given(answers, st.dictionaries(st.sampled_from(ENGINES), st.integers(0, 12)))
def test_what_is_expected_beyond_is_said_of_each(answer: MatchAnswer, expected: dict[EngineId, int]) -> None:
    told = {match.engine: match for match in answer.expecting(expected).matches}
    assert told == {
        match.engine: match._replace(expected=max(match.blocks, expected.get(match.engine, 0)))
        for match in answer.matches
    }


@given(st.lists(answers, max_size=1), answers)
def test_answers_about_different_engines_are_joined(first: list[MatchAnswer], second: MatchAnswer) -> None:
    unknown = (EngineId("new:1"),)
    joined = MatchAnswer.joined([*first, second], unknown)
    assert sorted(joined.matches) == sorted(match for answer in (*first, second) for match in answer.matches)
    assert joined.unknown == unknown
