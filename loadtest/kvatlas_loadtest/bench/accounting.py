"""What processes have used, by the operating system's books (`/proc`, Linux): CPU of all their threads, and memory."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def cpu_s(*pids: int) -> float:
    """Seconds of CPU, in user and kernel mode, threads that have ended included; to a hundredth of a second."""
    return sum(_ticks(pid) for pid in pids) / _TICKS_PER_S


def running_s(pid: int) -> float:
    """Seconds on a CPU of the threads it has now, to the nanosecond: for what is too short for `cpu_s`."""
    spent = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            spent += int((thread / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # it has just ended
            continue
    return spent / 1e9


def resident_bytes(pid: int | None = None) -> int:
    """Of this process, or another one."""
    pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1])
    return pages * _PAGE_BYTES


def busy_share() -> tuple[float, float]:
    """(seconds of CPU this machine has spent on anything, seconds it could have): two readings tell how busy it was."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / _TICKS_PER_S, sum(fields) / _TICKS_PER_S


def _ticks(pid: int) -> int:
    # utime and stime are the 14th and 15th field; the 2nd, the command, may hold blanks and brackets
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
