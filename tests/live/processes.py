"""Child processes of the live tests: started in a group of their own, awaited with a deadline, ended with the group.

What a child writes goes to a file; where it does not come up, the end of that file is the error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TAIL_CHARS = 4000
POLL_S = 0.2


class DidNotComeUp(AssertionError):
    """A child died, or was not ready in time; holds the end of its log."""


class Child:
    """One process and all it starts."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=environ, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def wait_until(self, ready: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Raises `DidNotComeUp`."""
        end = time.monotonic() + deadline_s
        while not ready():
            status = self._process.poll()
            if status is not None:
                raise DidNotComeUp(f"{self.name} ended with status {status} before {what}:\n{self.tail()}")
            if time.monotonic() > end:
                raise DidNotComeUp(f"{self.name}: no {what} within {deadline_s:g} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL_CHARS:]

    def stop(self, patience_s: float = 20.0) -> None:
        """Asks the group to end, then makes it."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        self._signal(signal.SIGKILL)  # also what outlived its parent
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # the whole group is gone


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
