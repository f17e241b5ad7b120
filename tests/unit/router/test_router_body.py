"""Reading a body without touching it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_router.core.body import Body, InvalidBody

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidBody):
        assert isinstance(Body.parse(raw).fields, dict)


@pytest.mark.parametrize("raw", [b"", b"[]", b'"x"', b"{", b"{]}", b"\xff{}", b"[" * 100_000])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidBody):
        Body.parse(raw)


@pytest.mark.parametrize("raw", [b'{"temperature": NaN}', b'{"prompt": "\\ud800"}'])
def test_what_engines_accept_is_accepted(raw: bytes) -> None:
    assert Body.parse(raw).fields.keys() == json.loads(raw).keys()


@given(st.dictionaries(st.sampled_from(["model", "stream", "user", "vllm_xargs", "stream_options"]), json_values))
def test_fields_of_any_type_are_read(fields: dict[str, Any]) -> None:
    body = Body.parse(json.dumps(fields).encode())
    assert body.model is None or body.model == fields["model"]
    assert body.streams == (fields.get("stream") is True)
    assert isinstance(body.asks_usage, bool)
    assert isinstance(body.asks_reannouncing, bool)
    assert body.session(None)


def test_reannouncing_is_seen() -> None:
    assert Body.parse(b'{"vllm_xargs": {"kv_cache_report_mode": "full"}}').asks_reannouncing
    assert not Body.parse(b'{"vllm_xargs": {"other": 1}}').asks_reannouncing


def test_the_best_sign_of_a_session_wins() -> None:
    body = Body.parse(b'{"user": "ann", "prompt_cache_key": "k", "prompt": "x"}')
    assert body.session("s1") == b"header:s1"
    assert body.session(None) == b"prompt_cache_key:k"
    assert Body.parse(b'{"user": "ann", "prompt": "x"}').session(None) == b"user:ann"
    start = b'{"prompt": "' + b"a" * 2000
    assert Body.parse(start + b'"}').session(None) == Body.parse(start + b'bcd"}').session(None)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), json_values), st.none() | st.dictionaries(st.text(), json_values)
)
def test_asking_for_usage_changes_nothing_else(fields: dict[str, Any], options: dict[str, Any] | None) -> None:
    given_fields = fields | {"stream_options": options}
    asking = json.loads(Body.parse(json.dumps(given_fields).encode()).asking_usage())
    assert asking == given_fields | {"stream_options": (options or {}) | {"include_usage": True}}


def test_asking_for_usage_keeps_the_bytes_of_other_values() -> None:
    raw = b'{"temperature": 0.10, "big": 12345678901234567890123, "prompt": "\\u00e9"}'
    fields = msgspec.json.decode(Body.parse(raw).asking_usage(), type=dict[str, msgspec.Raw])
    assert bytes(fields["temperature"]) == b"0.10"
    assert bytes(fields["big"]) == b"12345678901234567890123"
    assert bytes(fields["prompt"]) == b'"\\u00e9"'


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": "é" * 5000}, {"content": ["a" * 5000, {"n": 1}], "role": "x"}]
)
def test_an_opening_is_how_the_first_message_begins(message: dict[str, Any]) -> None:
    body = Body.parse(json.dumps({"messages": [message, {"role": "user", "content": "later"}]}).encode())
    assert body.opening() == msgspec.json.encode([message])[:1024]
