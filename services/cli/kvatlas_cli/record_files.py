"""Writes a capture, line by line, in the format that `capture` reads. Closed in time, the files are whole.

A capture without a request is none: what was written of it is removed, so that the next attempt finds the folder free.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

EVENTS, REQUESTS = "events.jsonl", "requests.jsonl"
MODELS, METRICS = "models.json", "metrics.txt.gz"


class CaptureExists(FileExistsError):
    """The folder holds a capture already, which is not overwritten."""


class CaptureWriter:
    """`with CaptureWriter(folder) as files`. Raises `CaptureExists`, or `OSError` when the folder cannot be made."""

    def __init__(self, folder: Path) -> None:
        taken = [name for base in (EVENTS, REQUESTS) for name in (base, f"{base}.gz") if (folder / name).exists()]
        if taken:
            raise CaptureExists(f"{folder} already holds {taken[0]}: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._count = 0
        self._stack = ExitStack()
        self._events, self._requests = (self._open(name) for name in (EVENTS, REQUESTS))

    def _open(self, name: str) -> TextIO:
        return self._stack.enter_context(gzip.open(self.folder / f"{name}.gz", "wt", encoding="utf-8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        if self._count == 0:
            for name in (f"{EVENTS}.gz", f"{REQUESTS}.gz", MODELS, METRICS):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something of somebody else's
                self.folder.rmdir()

    def message(self, t: float, frames: Sequence[bytes]) -> None:
        """One event message; `t` in seconds since the epoch."""
        line = {"t": round(t, 4), "frames": [base64.b64encode(frame).decode() for frame in frames]}
        self._events.write(json.dumps(line, separators=(",", ":")) + "\n")

    def request(self, line: Mapping[str, Any]) -> None:
        self._count += 1
        self._requests.write(json.dumps(line, separators=(",", ":")) + "\n")

    def models(self, page: bytes) -> None:
        """The engine's `/v1/models`, as it gave it."""
        (self.folder / MODELS).write_bytes(page)

    def metrics(self, page: bytes) -> None:
        """The engine's `/metrics`; a later page replaces an earlier one."""
        (self.folder / METRICS).write_bytes(gzip.compress(page))
