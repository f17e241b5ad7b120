"""A process of ours through all its lives: started, killed, stopped and started again, by its own pid only.

Ports are chosen by the process in its first life (port 0) and told to it in every later one: whoever knew where it was
finds it there again. Each process leads a process group of its own, so that a Ctrl-C at the terminal reaches the
harness alone, which then ends them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.02
START_S = 60.0  # imports alone take seconds on a crowded machine
STOP_S = 30.0
TAIL_CHARS = 2000
UNSOUND = ("Traceback (most recent call last)", "never retrieved", "never awaited", '"level": "critical"')


class ProcessFailed(RuntimeError):
    """It did not start, or ended when it should not have. Holds the end of its log."""


class Node:
    """`command()` says how to start it now; `ready(line)` takes each JSON line it says until one means readiness."""

    def __init__(self, name: str, folder: Path, command: Callable[[], Sequence[str]], ready: Callable[[Any], bool]):
        self.name = name
        self.log = folder / f"{name}.log"
        self.lives = 0
        self._command = command
        self._ready = ready
        self._popen: subprocess.Popen[bytes] | None = None
        self._read_from = 0

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def pid(self) -> int:
        """Of its present life, or the last. Raises `ProcessFailed` before the first."""
        if self._popen is None:
            raise ProcessFailed(f"{self.name} has not been started")
        return self._popen.pid

    async def start(self) -> None:
        """Returns when it is ready. Raises `ProcessFailed`."""
        if self.running:
            raise ProcessFailed(f"{self.name} is running already")
        self.lives += 1
        self._launch()
        deadline = time.monotonic() + START_S
        while not any(map(self._ready, self._lines())):
            if not self.running or time.monotonic() > deadline:
                tail = self.text()[-TAIL_CHARS:]
                raise ProcessFailed(f"{self.name} did not become ready; the end of its log:\n{tail}")
            await asyncio.sleep(POLL_S)

    def kill(self) -> None:
        """At once, as an out-of-memory killer does it. Also of one that stands still; nothing if it is gone."""
        if self._popen is not None:
            if self.running:
                self._popen.kill()
            self._popen.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def stop(self) -> int:
        """Asks it to end (SIGTERM) and answers its exit status; one that does not end is killed: `ProcessFailed`."""
        assert self._popen is not None
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while self.running:
            if time.monotonic() > deadline:
                self.kill()
                raise ProcessFailed(f"{self.name} did not end within {STOP_S:g} s of SIGTERM")
            await asyncio.sleep(POLL_S)
        return self._popen.wait()

    def text(self) -> str:
        """What this life has said."""
        with self.log.open("rb") as log:
            log.seek(self._read_from)
            return log.read().decode(errors="replace")

    def unsound(self) -> list[str]:
        """Signs of bugs of ours in the log of all its lives, with the lines after them."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return [f"{self.name}: {text[max(0, at - 300) : at + 1500]}" for s in UNSOUND if (at := text.find(s)) >= 0]

    def _launch(self) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVATLAS_")}
        with self.log.open("ab") as output:
            self._read_from = output.tell()
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *self._command()],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environ | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )

    def _lines(self) -> list[Any]:
        found: list[Any] = []
        for line in self.text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def _signal(self, number: signal.Signals) -> None:
        if not self.running:
            raise ProcessFailed(f"{self.name} is not running")
        assert self._popen is not None
        self._popen.send_signal(number)
