"""Captures: what a live engine published and answered, as files.

`events.jsonl[.gz]`: a line per ZeroMQ message, `{"t": seconds, "frames": [base64, ...]}`, in the order of arrival.
`requests.jsonl[.gz]`: a line per request, one at a time: `prompt_token_ids`, `body`, the engine's own `cached_tokens`,
and `events_before`, how many messages had arrived before it was sent. Optional: `i`, its number; `data_parallel_rank`,
the rank it was pinned to; `concurrent`, that it cannot be held against the index, because others were under way.
`models.json` (optional): the engine's `/v1/models`, which alone tells the paths of LoRA adapters.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvatlas_common.blocks.extras import Lora, PromptExtras
from kvatlas_common.engines.pages import MalformedPage, parse_models
from kvatlas_common.fleet import Adapter


class BadCapture(ValueError):
    """The folder is not a capture, or a line of it is not what it should be; names the file and the line."""


@dataclass(frozen=True, slots=True)
class CapturedMessage:
    t: float
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CapturedRequest:
    number: int
    prompt_token_ids: list[int]
    cached_tokens: int
    events_before: int
    rank: int
    model: str | None
    cache_salt: str | None
    concurrent: bool

    def extras(self, adapters: tuple[Adapter, ...]) -> PromptExtras:
        adapter = next((a for a in adapters if a.name == self.model), None)
        lora = Lora(adapter.name, adapter.number, adapter.path) if adapter else None
        return PromptExtras(lora, self.cache_salt)


@dataclass(frozen=True, slots=True)
class Capture:
    messages: list[CapturedMessage]
    requests: list[CapturedRequest]
    adapters: tuple[Adapter, ...]


def load(folder: Path) -> Capture:
    """Raises `BadCapture`."""
    messages = [_message(where, line) for where, line in _lines(folder, "events.jsonl")]
    requests, earlier = list[CapturedRequest](), 0
    for where, line in _lines(folder, "requests.jsonl"):
        request = _request(where, line, len(requests))
        least = 0 if request.concurrent else earlier
        if not least <= request.events_before <= len(messages):
            raise BadCapture(
                f"{where}: events_before is {request.events_before}, and should be {least} (that of the request "
                f"before) to {len(messages)} (all messages captured)"
            )
        earlier = earlier if request.concurrent else request.events_before
        requests.append(request)
    return Capture(messages, requests, _adapters(folder / "models.json"))


def _adapters(path: Path) -> tuple[Adapter, ...]:
    try:
        return parse_models(path.read_bytes()).adapters if path.exists() else ()
    except (OSError, MalformedPage) as error:
        raise BadCapture(f"{path} cannot be read: {error}") from None


def _lines(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            break
    else:
        raise BadCapture(f"{folder} holds no {name} and no {name}.gz: name a folder made by `kvatlas record`")
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise BadCapture(f"{path}:{number} is not a JSON object")
                    yield f"{path}:{number}", value
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadCapture(f"{path} cannot be read: {error}") from None


def _message(where: str, line: dict[str, Any]) -> CapturedMessage:
    try:
        frames = tuple(base64.b64decode(frame, validate=True) for frame in line["frames"])
        return CapturedMessage(float(line["t"]), frames)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadCapture(f"{where}: not a captured message: {error!r}") from None


def _request(where: str, line: dict[str, Any], place: int) -> CapturedRequest:
    try:
        body = line.get("body") or {}
        return CapturedRequest(
            number=int(line.get("i", place)),
            prompt_token_ids=[int(token) for token in line["prompt_token_ids"]],
            cached_tokens=int(line["cached_tokens"]),
            events_before=int(line["events_before"]),
            rank=int(line.get("data_parallel_rank") or 0),
            model=_text(body.get("model")),
            cache_salt=_text(body.get("cache_salt")),
            concurrent=bool(line.get("concurrent")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadCapture(f"{where}: not a captured request: {error!r}") from None


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is no text")
