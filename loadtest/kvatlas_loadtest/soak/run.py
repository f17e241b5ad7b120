"""A soak: the deployment, the load, samples every few seconds, what they come to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp

from kvatlas_loadtest.bench.deployment import answers, indexer, page, process, router, until, valkey
from kvatlas_loadtest.bench.ingest import even_names
from kvatlas_loadtest.chaos.books import Figures
from kvatlas_loadtest.chaos.load import Load, Shape
from kvatlas_loadtest.process import UNSOUND, ProcessFailed
from kvatlas_loadtest.soak.load import asked
from kvatlas_loadtest.soak.samples import Sample, Watched, sample
from kvatlas_loadtest.soak.verdict import keys_most

ENGINES, ROUTERS, SHARDS = 4, 2, 2
LOOKUP_DEADLINE_MS = "200"
"""What is tested is what is left behind, not how crowded this machine is."""
TRACE_CHARS = 1500


@dataclass(frozen=True, slots=True)
class Wanted:
    """`prompts`: distinct ones, 0: each is new. `every_s`: between samples. `blocks`: of each engine's pool."""

    minutes: float = 10.0
    redis: bool = True
    every_s: float = 3.0
    prompts: int = 400
    blocks: int = 320
    seed: int = 0
    shape: Shape = field(default_factory=Shape)


@dataclass(slots=True)
class Soaked:
    """`samples` by process, in order. `troubles`: what else should not have been."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)
    troubles: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Teller(Protocol):
    """Who is told how the run goes."""

    def doing(self, text: str) -> None: ...
    def sampled(self, at: float, of: float, requests: int, samples: dict[str, Sample]) -> None: ...


async def run(wanted: Wanted, folder: Path, teller: Teller) -> Soaked:
    """Raises `ProcessFailed` where a process does not start or is gone, `TimeoutError` where one is not ready."""
    soaked = Soaked()
    async with AsyncExitStack() as stack:
        watched, routers = await _deployed(stack, wanted, folder, teller)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        bodies = asked(wanted.shape, wanted.seed, wanted.prompts)
        load = Load(session, lambda: routers, wanted.shape, wanted.seed, bodies)
        load.start()
        stack.push_async_callback(load.stop)
        await _sampled(wanted, watched, load, soaked, teller)
        await load.pause()
        soaked.figures = Figures.of(load.exchanges)
    soaked.troubles += _troubles(soaked.figures, folder)
    if (keys := keys_most(soaked.samples)) > ENGINES * wanted.blocks:
        soaked.troubles.append(f"{keys} block keys in the index, more than the {ENGINES * wanted.blocks} engines have")
    return soaked


async def _sampled(wanted: Wanted, watched: list[Watched], load: Load, soaked: Soaked, teller: Teller) -> None:
    """Until the time is up. Asks with connections of its own, which are closed each time and so count nowhere."""
    lasts, begun = wanted.minutes * 60, time.monotonic()
    soaked.samples = {each.name: [] for each in watched}
    while (at := time.monotonic() - begun) < lasts:
        async with aiohttp.ClientSession() as session:
            try:
                taken = {each.name: await sample(each, session, at) for each in watched}
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                raise ProcessFailed(f"a process does not answer after {at:.0f} s: {error!r}") from error
        for name, its in taken.items():
            soaked.samples[name].append(its)
        teller.sampled(at, lasts, len(load.exchanges), taken)
        await asyncio.sleep(max(at + wanted.every_s - (time.monotonic() - begun), 0.0))
    soaked.seconds = time.monotonic() - begun


async def _deployed(
    stack: AsyncExitStack, wanted: Wanted, folder: Path, teller: Teller
) -> tuple[list[Watched], list[str]]:
    """Everything, ready: what to watch, and where the routers are."""
    enter, watched = stack.enter_async_context, list[Watched]()
    teller.doing("starting engines")
    engines_pid, engines = await enter(_engines(folder, wanted))
    flags = [part for engine in engines for part in ("--engine", engine)]
    store: list[str] = []
    if wanted.redis:
        teller.doing("starting Valkey")
        server = await enter(valkey(folder))
        store = ["--store", server.url]
        watched.append(Watched("valkey", server.pid))
    teller.doing("starting shards and routers")
    grpc: list[str] = []
    addresses = [engine.partition(",")[0] for engine in engines]
    called = even_names(addresses, SHARDS if wanted.redis else 1)  # so that each owns as many engines
    for number, shard_name in enumerate(called):
        name = f"shard-{number}"
        shard = await enter(indexer(folder, *flags, *store, *(["--shard", shard_name] if store else []), name=name))
        tasks, keys = "kvatlas_indexer_asyncio_tasks", "kvatlas_indexer_keys"
        watched.append(Watched(name, shard.pid, f"{shard.rest}/metrics", tasks, keys))
        grpc += ["--indexer", shard.grpc]
        await until(lambda url=shard.rest: _all_ready(url), "every engine to be ready")  # type: ignore[misc]
    urls: list[str] = []
    for number in range(ROUTERS):
        name = f"router-{number}"
        state = ("--state-dir", str(folder / f"{name}-state"), "--lookup-deadline-ms", LOOKUP_DEADLINE_MS)
        routing = await enter(router(folder, *grpc, *state, name=name))
        watched.append(Watched(name, routing.pid, f"{routing.admin}/metrics", "kvatlas_router_asyncio_tasks"))
        urls.append(routing.url)
        await until(lambda url=routing.url: answers(f"{url}/readyz"), f"{name} to be ready")  # type: ignore[misc]
    watched.append(Watched("engines", engines_pid))
    return watched, urls


@contextlib.asynccontextmanager
async def _engines(folder: Path, wanted: Wanted) -> AsyncIterator[tuple[int, list[str]]]:
    command = ["kvatlas_loadtest.soak.engines", "--count", str(ENGINES), "--blocks", str(wanted.blocks)]
    async with process("engines", folder, command, lambda line: "engines" in line) as (pid, said):
        yield pid, said["engines"]


async def _all_ready(rest: str) -> bool:
    views = (await page(f"{rest}/v1/engines"))["engines"]
    return len(views) == ENGINES and all(view["health"] == "ready" for view in views)


def _troubles(figures: Figures, folder: Path) -> list[str]:
    found = list(_unsound(folder))
    if figures.failed or figures.cut:
        found.append(f"{figures.failed} requests failed, {figures.cut} were cut: {dict(figures.failures)}")
    return found


def _unsound(folder: Path) -> Iterator[str]:
    """Signs of bugs of ours in any log."""
    for log in sorted(folder.glob("*.log")):
        text = log.read_text(errors="replace")
        for sign in UNSOUND:
            if (at := text.find(sign)) >= 0:
                yield f"{log.name}: {text[max(0, at - 300) : at + TRACE_CHARS]}"
