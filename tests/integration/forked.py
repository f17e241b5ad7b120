"""Processes that begin with everything of ours imported: that is nearly all of what starting one costs.

A server that has imported it, and has done nothing else, forks for whoever asks (`forkserver` of `multiprocessing`).
From then on it is a process as any other, with its own pid and its own end; but it ends without taking the interpreter
down, so what is tested of that end is tested of a fresh process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kvatlas_cli.up", "kvatlas_indexer.__main__", "kvatlas_router.__main__"])


class Forked:
    """`python -m` with this command, to be used as a `Popen`. It ends with this process at the latest.

    `errors`: where the standard error goes; None: to the `output`, too.
    """

    def __init__(
        self, command: Sequence[str], output: Path, environ: Mapping[str, str], errors: Path | None = None
    ) -> None:
        files = (output, errors or output)
        self._process = _CONTEXT.Process(target=_run, args=(list(command), files, dict(environ)), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(command: list[str], files: tuple[Path, Path], environ: dict[str, str]) -> None:
    for number, path in enumerate(files, 1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
