"""Cached tokens out of the bytes that pass by."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_router.core.usage import Tail, Usage, read_usage, response_id

CHAT = {
    "id": "chatcmpl-1",
    "choices": [{"message": {"content": 'a quote: "usage": {"prompt_tokens_details": {"cached_tokens": 1}}'}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}},
    "kv_transfer_params": None,
}


def chunked(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({c % (len(data) + 1) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(st.binary(max_size=300), st.lists(st.integers(0, 10**6), max_size=20), st.integers(1, 100))
def test_the_tail_is_the_last_bytes_however_they_came(data: bytes, cuts: list[int], limit: int) -> None:
    tail = Tail(limit)
    for chunk in chunked(data, cuts):
        tail.feed(chunk)
    assert tail.bytes() == data[-limit:]


def test_a_whole_answer() -> None:
    assert read_usage(json.dumps(CHAT).encode()) == Usage(8, 4, 9)


def test_words_of_the_answer_are_not_taken_for_usage() -> None:
    assert read_usage(json.dumps(CHAT | {"usage": None}).encode()) == Usage()


def test_the_last_usage_of_a_stream_counts() -> None:
    chunks = [{"usage": {"completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 64}}} for n in range(5)]
    stream = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + b"data: [DONE]\n\n"
    assert read_usage(stream) == Usage(64, 4)


def test_shapes_of_the_other_apis() -> None:
    responses = {"usage": {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 5}}
    messages = {"usage": {"input_tokens": 4, "cache_read_input_tokens": 7, "output_tokens": 2}}
    assert read_usage(json.dumps({"response": responses}).encode()) == Usage(3, 5, 9)
    assert read_usage(json.dumps(messages).encode()) == Usage(7, 2, 11)


def test_an_engine_that_does_not_say_is_unknown_not_zero() -> None:
    assert read_usage(b'{"usage": {"prompt_tokens": 5, "prompt_tokens_details": null}}') == Usage(None, None, 5)
    assert read_usage(b"") == Usage()
    assert read_usage(b'{"usage": {"cut": ') == Usage()


@given(st.binary(max_size=300))
def test_any_bytes_are_read(data: bytes) -> None:
    read_usage(b'"usage": {' + data)


def test_the_id_of_a_stored_response() -> None:
    assert response_id(b'{"id": "resp_ab12", "object": "response"}') == "resp_ab12"
    assert response_id(b'data: {"response":{"id":"resp_x-Y_9"}}') == "resp_x-Y_9"
    assert response_id(b'{"id": "chatcmpl-1"}') is None
