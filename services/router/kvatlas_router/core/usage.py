"""What the engine says it served from its cache, read from the bytes that pass by.

Nothing is held back: a copy of the last `TAIL_BYTES` is kept and looked at once, when the response has ended. The usage
object of every OpenAI-like API stands at the end of a body, or in the last events of a stream; within JSON strings
quotes are escaped, so the bytes `"usage":` are always a key.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

TAIL_BYTES = 64 * 1024

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')


@dataclass(frozen=True, slots=True)
class Usage:
    """None: the engine did not say."""

    cached_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


NO_USAGE = Usage()


class Tail:
    """The last bytes of a response."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= self._limit:
            self._size -= len(self._chunks.popleft())

    def bytes(self) -> bytes:
        return b"".join(self._chunks)[-self._limit :]


def read_usage(tail: bytes) -> Usage:
    """The last usage object in the bytes that can be read."""
    for found in reversed(list(_USAGE.finditer(tail))):
        fields = _object_at(tail, found.end() - 1)
        if fields is not None:
            return _usage(fields)
    return NO_USAGE


def response_id(head: bytes) -> str | None:
    """The id under which an engine keeps a `/v1/responses` answer (vLLM 0.32 responses/protocol.py: `resp_...`)."""
    found = _RESPONSE_ID.search(head)
    return found.group(1).decode() if found else None


def _object_at(data: bytes, start: int) -> Mapping[str, Any] | None:
    """The JSON object that begins at `start`; usage objects hold no strings with braces."""
    depth = 0
    for position in range(start, len(data)):
        if data[position] == 0x7B:
            depth += 1
        elif data[position] == 0x7D:
            depth -= 1
            if depth == 0:
                return _decoded(data[start : position + 1])
    return None


def _decoded(data: bytes) -> Mapping[str, Any] | None:
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return fields if isinstance(fields, dict) else None


def _usage(fields: Mapping[str, Any]) -> Usage:
    """OpenAI's two shapes, and Anthropic's."""
    cached = fields.get("cache_read_input_tokens")
    for name in ("prompt_tokens_details", "input_tokens_details"):
        details = fields.get(name)
        if isinstance(details, Mapping):
            cached = details.get("cached_tokens", cached)
    completion = fields.get("completion_tokens", fields.get("output_tokens"))
    return Usage(*(count if isinstance(count, int) else None for count in (cached, completion, _prompt_tokens(fields))))


def _prompt_tokens(fields: Mapping[str, Any]) -> object:
    """Anthropic's `input_tokens` are those that were neither read from a cache nor written to it."""
    parts = [fields.get(name) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")]
    counts = [count for count in (fields.get("input_tokens"), *parts) if isinstance(count, int)]
    return fields.get("prompt_tokens", sum(counts) if counts else None)
