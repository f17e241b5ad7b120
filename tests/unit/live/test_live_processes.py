"""Child processes: their death and their silence are told with their log, and they leave nothing behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.live.processes import Child, DidNotComeUp, answers, free_ports

GRANDCHILD = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(p.pid, flush=True); p.wait()"
)


def test_a_child_that_dies_shows_its_log(tmp_path: Path) -> None:
    child = Child("engine", [sys.executable, "-c", "print('no memory'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(DidNotComeUp, match=r"(?s)engine ended with status 3 before readiness.*no memory"):
        child.wait_until(lambda: False, 10, "readiness")
    child.stop()


def test_a_child_that_is_not_ready_in_time_shows_its_log(tmp_path: Path) -> None:
    child = Child("engine", [sys.executable, "-uc", "print('loading'); import time; time.sleep(600)"], tmp_path / "log")
    try:
        child.wait_until(lambda: "loading" in child.tail(), 10, "first line")
        with pytest.raises(DidNotComeUp, match=r"(?s)no readiness within 0.1 s.*loading"):
            child.wait_until(lambda: False, 0.1, "readiness")
    finally:
        child.stop()


def test_stopping_ends_what_a_child_started(tmp_path: Path) -> None:
    child = Child("engine", [sys.executable, "-c", GRANDCHILD], tmp_path / "log")
    child.wait_until(lambda: child.tail().endswith("\n"), 10, "grandchild")
    grandchild = int(child.tail())
    child.stop()
    end = time.monotonic() + 10
    while _runs(grandchild) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_ports_are_free_and_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert not answers(f"http://127.0.0.1:{ports[0]}/")
