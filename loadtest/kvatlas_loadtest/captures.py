"""Reads a capture: the event messages of a real engine and the requests that caused them.

`events.jsonl[.gz]`: one line per ZeroMQ message, base64 `frames` [topic, seq, payload]. `requests.jsonl[.gz]`: one line
per request, one at a time, in order, with token ids in and out and the engine's own `cached_tokens`.
"""

from __future__ import annotations

import base64
import binascii
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec


class CaptureError(ValueError):
    """A capture that cannot be read; names file and line."""


class CapturedRequest(msgspec.Struct, frozen=True):
    """One request as it was recorded."""

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    cached_tokens: int
    body: dict[str, Any] = {}

    @property
    def cache_salt(self) -> str | None:
        return self.body.get("cache_salt") or None


class _Message(msgspec.Struct, frozen=True):
    frames: list[str]


@dataclass(frozen=True, slots=True)
class Capture:
    """`payloads`: the msgpack batch of each message, in arrival order."""

    payloads: tuple[bytes, ...]
    requests: tuple[CapturedRequest, ...]


def read_capture(folder: Path) -> Capture:
    """Raises `CaptureError`."""
    decode_message = msgspec.json.Decoder(_Message).decode
    decode_request = msgspec.json.Decoder(CapturedRequest).decode
    payloads, requests = [], []
    for where, line in _lines(folder, "events.jsonl"):
        try:
            frames = [base64.b64decode(frame, validate=True) for frame in decode_message(line).frames]
        except (msgspec.MsgspecError, binascii.Error) as error:
            raise CaptureError(f"{where}: {error}") from None
        if len(frames) != 3:
            raise CaptureError(f"{where}: {len(frames)} frames instead of [topic, seq, payload]")
        payloads.append(frames[2])
    for where, line in _lines(folder, "requests.jsonl"):
        try:
            requests.append(decode_request(line))
        except msgspec.MsgspecError as error:
            raise CaptureError(f"{where}: {error}") from None
    return Capture(tuple(payloads), tuple(requests))


def _lines(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    packed, plain = folder / f"{name}.gz", folder / name
    path = packed if packed.is_file() else plain
    try:
        with gzip.open(path) if path is packed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError) as error:
        raise CaptureError(f"{path}: {error}") from None
