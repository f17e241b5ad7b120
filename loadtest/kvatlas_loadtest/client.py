"""Asks an OpenAI-compatible server one streamed question and measures the answer as a user would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

ENGINE_HEADER = "x-kvatlas-engine"


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

    `engine`: which engine a router says it chose; empty without a router.
    """

    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    engine: str
    text: str
    error: str = ""


@dataclass(slots=True)
class _Reading:
    """What the stream has said so far."""

    usage: _Usage = field(default_factory=_Usage)
    text: list[str] = field(default_factory=list)
    first_at: float | None = None
    error: str = "cut"  # until the stream says that it is done

    def line(self, line: bytes) -> None:
        """Raises `msgspec.MsgspecError` (a `ValueError`) for a chunk that is none."""
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            return
        if data == b"[DONE]":
            self.error = "" if self.error == "cut" else self.error
            return
        chunk = _decode_chunk(data)
        self.usage = chunk.usage or self.usage
        if chunk.error is not None:
            self.error = "error in the stream"
        for choice in chunk.choices:
            if piece := choice.delta.content or choice.text:
                self.first_at = self.first_at or time.perf_counter()
                self.text.append(piece)


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], path: str) -> Answer:
    """Posts `body`, streaming, usage switched on. Raises nothing for a failed request: `error` says what it was."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begun, engine, reading = time.perf_counter(), "", _Reading()
    try:
        async with session.post(url + path, json=asked) as response:
            engine = response.headers.get(ENGINE_HEADER, "")
            if response.status == 200:
                async for line in response.content:
                    reading.line(line)
            else:
                reading.error = f"status {response.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
        reading.error = type(failure).__name__
    ended = time.perf_counter()
    details = reading.usage.prompt_tokens_details
    return Answer(
        ttft_s=(reading.first_at or ended) - begun,
        total_s=ended - begun,
        prompt_tokens=reading.usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else None) or 0,
        output_tokens=reading.usage.completion_tokens,
        engine=engine,
        text="".join(reading.text),
        error=reading.error,
    )
