"""What a process uses now: memory, open files and threads by the system's books, asyncio tasks by its own metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kvatlas_loadtest.bench.accounting import resident_bytes

ASK_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Watched:
    """A process. `metrics`: where its page is, "" if it has none; `tasks` and `keys`: families to read there."""

    name: str
    pid: int
    metrics: str = ""
    tasks: str = ""
    keys: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """At `at` seconds from the beginning. `keys`: block keys the index holds. None: it does not tell."""

    at: float
    resident_mb: float
    files: int
    sockets: int
    threads: int
    tasks: float | None = None
    keys: float | None = None


async def sample(watched: Watched, session: aiohttp.ClientSession, at: float) -> Sample:
    """Raises `OSError` when the process has gone, `aiohttp.ClientError` when it does not answer."""
    page = await _page(session, watched.metrics) if watched.metrics else {}
    open_files = _open_files(watched.pid)
    return Sample(
        at=at,
        resident_mb=resident_bytes(watched.pid) / 1e6,
        files=len(open_files),
        sockets=sum(target.startswith("socket:") for target in open_files),
        threads=len(os.listdir(f"/proc/{watched.pid}/task")),
        tasks=page.get(watched.tasks),
        keys=page.get(watched.keys),
    )


def _open_files(pid: int) -> list[str]:
    found: list[str] = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except FileNotFoundError:  # it has just been closed
            continue
    return found


async def _page(session: aiohttp.ClientSession, url: str) -> Mapping[str, float]:
    """Families without labels, by name."""
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_WITHIN_S)) as response:
        response.raise_for_status()
        text = await response.text()
    return {
        found.name: found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if not found.labels
    }
