"""Processes of ours that tests kill, stop and start again. Only what was started here is ever signalled, by its pid.

Ports are taken by the processes themselves (port 0) and read from what they say, so nothing can be taken in between. A
process that is started again is told the ports of its first life: clients find it where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.forked import Forked

DEADLINE_S = 30.0  # far more than is needed: machines are shared
POLL_S = 0.02
TAIL_CHARS = 3000


async def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Until `condition`, which may be a coroutine function, answers something true.

    Raises `AssertionError` that says what did not happen.
    """
    ends_at = time.monotonic() + deadline_s
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return
        assert time.monotonic() < ends_at, f"{what}: not within {deadline_s:g} s, last seen: {found!r}"
        await asyncio.sleep(POLL_S)


class Process:
    """One `python -m` of ours, its output in a file. An async context that kills what is still there.

    `fresh`: an interpreter of its own from beginning to end, see `forked`.
    """

    def __init__(self, name: str, folder: Path, command: Sequence[str], *, fresh: bool = False) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVATLAS_")} | {"HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as output:
            if fresh:
                words = [sys.executable, "-m", *command]
                self._popen: subprocess.Popen[bytes] | Forked = subprocess.Popen(
                    words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ
                )
            else:
                self._popen = Forked(command, self.log, environ)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A test that fails shows the end of the log."""
        self.kill()
        if error is not None:
            error.add_note(f"--- the end of {self.name}'s log\n{self.text()[-TAIL_CHARS:]}")

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines it has written."""
        found: list[dict[str, Any]] = []
        for line in self.text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    async def says(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first of its JSON lines that is wanted. Raises `AssertionError` when it ends before, or says no such."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(line for line in self.lines() if wanted(line))
            assert found or self.running, f"{self.name} ended before {what}:\n{self.text()[-TAIL_CHARS:]}"
            return bool(found)

        await until(look, f"{self.name}: {what}")
        return found[0]

    def kill(self) -> None:
        """At once, as an out-of-memory killer does it."""
        if self.running:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.kill()
        self._popen.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.running, f"{self.name} is not running"
        self._popen.send_signal(number)

    async def exited(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit status, once it has ended by itself."""
        await until(lambda: not self.running, f"{self.name} to end", deadline_s)
        return self._popen.wait()

    def assert_sound(self) -> None:
        """No bug of ours has shown in its log: neither a traceback nor an exception nobody looked at."""
        text = self.text()
        for sign in ("Traceback (most recent call last)", "never retrieved", "never awaited", '"level": "critical"'):
            assert sign not in text, f"{self.name} logged {sign!r}:\n{text[max(0, text.index(sign) - 500) :][:4000]}"


class Engine(Process):
    """A simulated engine as a process of its own."""

    address = ""
    events_port = 0
    replay_port = 0

    @property
    def flags(self) -> tuple[str, str]:
        """How an indexer is told of it: dialled, with a replay endpoint."""
        events, replay = f"tcp://127.0.0.1:{self.events_port}", f"tcp://127.0.0.1:{self.replay_port}"
        return "--engine", f"{self.address},events={events},replay={replay}"


class Indexer(Process):
    grpc = ""
    rest = ""
    zmq = ""


class Router(Process):
    url = ""
    admin = ""


@contextlib.asynccontextmanager
async def engine(folder: Path, name: str, *options: str, again: Engine | None = None) -> AsyncIterator[Engine]:
    """`again`: the one that was killed, whose ports it takes."""
    ports: tuple[str, ...] = ()
    if again is not None:
        port, events = again.address.rpartition(":")[2], f"tcp://*:{again.events_port}"  # a wildcard: else it connects
        ports = ("--port", port, "--kv-events-endpoint", events)
        ports += ("--kv-events-replay-endpoint", f"tcp://127.0.0.1:{again.replay_port}")
    async with Engine(name, folder, ["kvatlas_loadtest", "engine", *ports, *options]) as started:
        line = await started.says(lambda line: "address" in line, "its addresses")
        started.address = line["address"]
        started.events_port, started.replay_port = (
            int(line[at].rpartition(":")[2]) for at in ("events_endpoint", "replay_endpoint")
        )
        yield started


@contextlib.asynccontextmanager
async def indexer(
    folder: Path, name: str, *options: str, again: Indexer | None = None, fresh: bool = False
) -> AsyncIterator[Indexer]:
    """`again`: the one before, whose ports it takes."""
    grpc, rest, zmq = (again.grpc, again.rest, again.zmq) if again else ("127.0.0.1:0",) * 2 + ("tcp://127.0.0.1:0",)
    ports = ("--grpc-listen", grpc, "--rest-listen", rest, "--zmq-listen", zmq)
    async with Indexer(name, folder, ["kvatlas_cli", "indexer", *ports, *options], fresh=fresh) as started:
        line = await started.says(lambda line: line.get("event") == "indexer ready", "readiness")
        started.grpc, started.rest, started.zmq = line["grpc"], line["rest"], line["zmq"][0]
        yield started


@contextlib.asynccontextmanager
async def router(
    folder: Path, name: str, *options: str, indexer: str, command: str = "router", fresh: bool = False
) -> AsyncIterator[Router]:
    """`indexer`: where it is, or was. `command`: `up` where its indexer is in the same process."""
    ports = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--indexer", indexer)
    async with Router(name, folder, ["kvatlas_cli", command, *ports, *options], fresh=fresh) as started:
        line = await started.says(lambda line: line.get("event") == "router listens", "listening")
        started.url, started.admin = (f"http://127.0.0.1:{line[port]}" for port in ("port", "admin_port"))
        yield started


def labelled(page: str, name: str, labels: Mapping[str, str]) -> float:
    """The sum of a Prometheus metric over all its series with these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted))
