"""Asks an OpenAI-compatible server one streamed question and measures the answer as a user would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec

ENGINE_HEADER, REASON_HEADER = "x-kvatlas-engine", "x-kvatlas-reason"
CUT, TIMEOUT = "cut", "timeout"


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    text: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. Times in seconds from sending; `error` is empty when it came whole, `text` what came of it.

    `ttft_s` None: nothing of it came. `gaps_s`: between the pieces of the stream, as they were read. Tokens as the
    server counts them; 0 where it does not say. `engine`, `reason`: which engine a router says it chose, and how; empty
    without a router.
    """

    ttft_s: float | None
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    engine: str
    text: str
    error: str = ""
    reason: str = ""
    gaps_s: tuple[float, ...] = ()


@dataclass(slots=True)
class _Reading:
    """What the stream has said so far."""

    usage: _Usage = field(default_factory=_Usage)
    text: list[str] = field(default_factory=list)
    came_at: list[float] = field(default_factory=list)  # of each piece
    error: str = CUT  # until the stream says that it is done

    def line(self, line: bytes) -> None:
        """Raises `msgspec.MsgspecError` (a `ValueError`) for a chunk that is none."""
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            return
        if data == b"[DONE]":
            self.error = "" if self.error == CUT else self.error
            return
        chunk = _decode_chunk(data)
        self.usage = chunk.usage or self.usage
        if chunk.error is not None:
            self.error = "error in the stream"
        for choice in chunk.choices:
            if piece := choice.delta.content or choice.text:
                self.came_at.append(time.perf_counter())
                self.text.append(piece)

    def failed(self, failure: Exception) -> None:
        """A stream that had begun is cut, whatever cut it, unless it has said itself what went wrong."""
        if self.error == CUT and not self.text:
            self.error = TIMEOUT if isinstance(failure, TimeoutError) else type(failure).__name__


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    engine_header: str = ENGINE_HEADER,
) -> Answer:
    """Posts `body`, streaming, usage switched on. Raises nothing for a failed request: `error` says what it was."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sent_headers = {"Content-Type": "application/json", **(headers or {})}
    begun, engine, reason, reading = time.perf_counter(), "", "", _Reading()
    try:
        async with session.post(url + path, data=msgspec.json.encode(asked), headers=sent_headers) as response:
            engine, reason = response.headers.get(engine_header, ""), response.headers.get(REASON_HEADER, "")
            if response.status == 200:
                async for line in response.content:
                    reading.line(line)
            else:
                reading.error = f"status {response.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
        reading.failed(failure)
    ended = time.perf_counter()
    usage, details = reading.usage, reading.usage.prompt_tokens_details
    return Answer(
        ttft_s=reading.came_at[0] - begun if reading.came_at else None,
        total_s=ended - begun,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else None) or 0,
        output_tokens=usage.completion_tokens,
        engine=engine,
        text="".join(reading.text),
        error=reading.error,
        reason=reason,
        gaps_s=tuple(later - earlier for earlier, later in pairwise(reading.came_at)),
    )
