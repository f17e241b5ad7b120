from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_loadtest.openai_requests import StopText, Wanted
from kvatlas_loadtest.openai_shapes import ApiError


def test_what_is_not_said_has_vllms_defaults() -> None:
    wanted = Wanted.of({})
    assert (wanted.stream, wanted.choices, wanted.max_tokens, wanted.stop, wanted.cache_salt) == (
        False,
        1,
        None,
        (),
        None,
    )


def test_what_is_said() -> None:
    wanted = Wanted.of(
        {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 5,
            "max_completion_tokens": 7,
            "stop": "x",
            "stop_token_ids": [3],
            "cache_salt": "s",
            "n": 2,
        }
    )
    assert (wanted.include_usage, wanted.max_tokens, wanted.stop, wanted.stop_ids) == (True, 7, ("x",), (3,))
    assert (wanted.choices, wanted.cache_salt) == (2, "s")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "body.n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "body.stream"),
        ({"stop": [1]}, "body.stop"),
        ({"model": 5}, "body.model"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        Wanted.of(body)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, param)


@given(st.lists(st.text("ab.", max_size=3), max_size=12), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_at_the_first_stop_however_it_arrives(pieces: list[str], stop: list[str]) -> None:
    stopping = StopText(tuple(stop))
    shown, met = "", None
    for number, piece in enumerate(pieces, 1):
        text, met = stopping.push(piece, number == len(pieces))
        shown += text
        if met:
            break
    whole = "".join(pieces)
    cuts = [whole.find(s) for s in stop if s in whole]
    if met is None:
        assert not cuts
        assert shown == whole
    else:
        assert whole.startswith(shown + met)
        assert not any(s in shown for s in stop)
