"""Streams: dropping the one chunk nobody asked for, and ending what was cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_router.core.sse import HELD_BACK_BYTES_MAX, UsageChunkFilter, cut_event, ended


def event(fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


WORDS = [event({"choices": [{"delta": {"content": f"word {n}"}}], "usage": None}) for n in range(6)]
LAST_WITH_BOTH = event({"choices": [{"delta": {}}], "usage": {"completion_tokens": 6}})
USAGE = event({"choices": [], "usage": {"completion_tokens": 6}})
DONE = b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_only_the_usage_chunk_is_dropped_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b": ping\n\n" + b"".join(WORDS) + LAST_WITH_BOTH + USAGE + DONE
    places = sorted({c % len(stream) for c in cuts} | {0, len(stream)})
    dropper = UsageChunkFilter()
    passed = b"".join(dropper.feed(stream[a:b]) for a, b in itertools.pairwise(places))
    assert passed + dropper.rest() == stream.replace(USAGE, b"")
    assert dropper.dropped is not None
    assert dropper.dropped + b"\n\n" == USAGE


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_what_is_no_usage_chunk_passes_unchanged(chunks: list[bytes]) -> None:
    dropper = UsageChunkFilter()
    assert b"".join(map(dropper.feed, chunks)) + dropper.rest() == b"".join(chunks)


def test_an_endless_event_is_passed_on() -> None:
    dropper = UsageChunkFilter()
    huge = b"data: " + b"x" * HELD_BACK_BYTES_MAX
    assert dropper.feed(huge) == huge
    assert dropper.feed(b"y\n\n" + USAGE) == b"y\n\n"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_cut_ends_with_an_event_that_says_error(path: str) -> None:
    text = (b'data: {"half' + cut_event(path, "engine a:1 was lost")).decode()
    last = text.rstrip("\n").split("\n\n")[-1]
    assert "engine a:1 was lost" in json.loads(last.partition("data: ")[2]).__repr__()
    assert last.startswith("event: error\n") == (path in ("/v1/responses", "/v1/messages"))


def test_a_stream_that_said_it_was_done_is_not_cut() -> None:
    assert ended(b"".join(WORDS) + DONE)
    assert not ended(b"".join(WORDS))
    assert not ended(b'data: {"text": "data: [DONE]"}')
