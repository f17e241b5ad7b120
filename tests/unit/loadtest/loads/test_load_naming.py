"""Block keys of a load: two prompts share them exactly as far as they are the same text under the same salt."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Segment, checked
from kvatlas_loadtest.loads.naming import BlockNames, Named
from kvatlas_loadtest.loads.presets import BLOCK_SIZE, PROFILE

SEGMENTS = st.lists(st.builds(Segment, st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=5)


def names(*arrivals: Arrival) -> list[Named]:
    made = BlockNames(PROFILE, checked(arrivals))
    return [made.of(index) for index in range(len(arrivals))]


def ask(*prompt: Segment | Answer, output: int = 1, salt: str | None = None, after: int | None = None) -> Arrival:
    return Arrival(0.0, tuple(prompt), output, salt=salt, after=after)


def written_out(prompt: Sequence[Segment]) -> list[tuple[int, int]]:
    """Every token as (segment, place in it): what a prompt says, the slow way."""
    return [(segment.seed, place) for segment in prompt for place in range(segment.tokens)]


def shared(one: Sequence[object], other: Sequence[object]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(SEGMENTS, SEGMENTS)
def test_keys_are_shared_as_far_as_whole_blocks_of_the_text_are(one: list[Segment], other: list[Segment]) -> None:
    a, b = names(ask(*one), ask(*other))
    assert a.prompt_tokens == len(written_out(one))
    in_prompt = a.prompt_tokens // BLOCK_SIZE, b.prompt_tokens // BLOCK_SIZE
    same = shared(written_out(one), written_out(other)) // BLOCK_SIZE
    assert shared(a.keys[: in_prompt[0]], b.keys[: in_prompt[1]]) == same
    assert len(set(a.keys)) == len(a.keys)


def test_a_later_turn_begins_with_the_keys_of_the_answer_before() -> None:
    first, second = names(
        ask(Segment(1, 100), output=100), ask(Segment(1, 100), Answer(0), Segment(2, 50), after=0, output=30)
    )
    assert second.prompt_tokens == 250
    assert len(first.keys) == 200 // BLOCK_SIZE
    assert list(second.keys[: len(first.keys)]) == list(first.keys)


def test_a_salt_keeps_prompts_apart_from_the_first_block_on() -> None:
    plain, salted, again = names(ask(Segment(1, 200)), ask(Segment(1, 200), salt="a"), ask(Segment(1, 200), salt="a"))
    assert not set(plain.keys) & set(salted.keys)
    assert salted.keys == again.keys


def test_the_first_block_has_the_hash_of_its_tokens() -> None:
    (named,) = names(ask(Segment(7, 300)))
    assert [int(key) for key in prompt_keys(PROFILE, [*named.root, 0])] == [named.keys[0]]


def test_the_last_token_is_never_served_from_a_cache() -> None:
    (named,) = names(ask(Segment(7, 2 * BLOCK_SIZE)))
    assert len(named.lookup(BLOCK_SIZE)) == 1
