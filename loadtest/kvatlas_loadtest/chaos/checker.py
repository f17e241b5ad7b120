"""Asks the engines for the truth and every shard for what it says, over HTTP as anybody could.

A *quick* look asks `POST /v1/match` for all blocks of each engine's table, as a router would, and `POST /v1/blocks` for
a sample of blocks held and gone. A *full* look asks for all of them, copy by copy. The index counts as right from the
first quick look that a full one confirms.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvatlas_loadtest.chaos.truth import SETTLE_S, Arrivals, Gone, Kept, Look, Table, Verdict, compare, settled

MODEL = "tiny"
KEYS_A_REQUEST = 512
SAMPLE = 192
ASK_WITHIN_S = 3.0
LOOK_EVERY_S = 0.1
PROBLEMS_KEPT = 3

Said = dict[str, dict[int, int]]  # engine -> block key -> copies
FAILURES = (aiohttp.ClientError, TimeoutError, ValueError)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one shard answers: the fleet, and copies of the blocks asked for."""

    engines: Mapping[str, Mapping[str, Any]]
    keys: Sequence[int]
    said: Said
    matched: Mapping[str, int]  # engine -> leading blocks of those that were asked for


@dataclass(frozen=True, slots=True)
class Recovered:
    """How long it took until the index was right (None: too long), the last look, and what was wrong before."""

    seconds: float | None
    last: Look
    wrong: tuple[str, ...] = ()


class Checker:
    """`engines` and `shards` are asked at every look: name -> base URL, of those that should answer now."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engines: Callable[[], Mapping[str, str]],
        shards: Callable[[], Mapping[str, str]],
        seed: int,
    ) -> None:
        self.gone = Gone()
        self._session = session
        self._engines = engines
        self._shards = shards
        self._chance = random.Random(seed)

    async def tables(self) -> dict[str, dict[int, int]]:
        """Engine -> its block table, of the engines that answer."""
        tables = await self._of_engines("blocks")
        self.gone.saw(tables.values())
        return tables

    async def arrivals(self) -> Mapping[str, Arrivals]:
        """The same, of when each of its blocks came."""
        return await self._of_engines("arrivals")

    async def look(self, *, full: bool = False) -> Look:
        """Takes the truth, asks every shard, and compares."""
        before = await self.tables()
        await asyncio.sleep(SETTLE_S)
        at, now = time.monotonic(), await self.tables()
        shards = self._shards()
        keys = self._keys(now, full)
        likely = {e: self._shuffled(k for k in t if before.get(e, {}).get(k)) for e, t in now.items()}
        answers = await asyncio.gather(
            *(self._ask(url, keys, likely) for url in shards.values()), return_exceptions=True
        )
        _raise_defects(answers)
        after = await self.tables()
        verdicts = [
            _verdict(shard, engine, asked, [before.get(engine, {}), now[engine], after[engine]], likely[engine])
            for shard, asked in zip(shards, answers, strict=True)
            if isinstance(asked, Asked)
            for engine in now
            if engine in after
        ]
        silent = [f"{s}: {a!r}"[:300] for s, a in zip(shards, answers, strict=True) if not isinstance(a, Asked)]
        silent += [e for e in self._engines() if e not in after]
        return Look(at, tuple(verdicts), tuple(silent))

    async def until(self, right: Callable[[Look], bool], within_s: float) -> Recovered:
        """Until the index is `right`, confirmed by a full look, or `within_s` have passed."""
        begun = time.monotonic()
        wrong: list[str] = []
        while True:
            look = await self.look()
            if right(look):
                full = await self.look(full=True)
                if right(full):
                    return Recovered(max(look.at - begun, 0.0), full, tuple(wrong))
                look = full
            wrong.append(f"{look.at - begun:.1f} s: {'; '.join(look.problems()[:PROBLEMS_KEPT])}")
            if time.monotonic() - begun > within_s:
                return Recovered(None, look, tuple(wrong))
            await asyncio.sleep(LOOK_EVERY_S)

    async def said(self, keys: Iterable[int]) -> dict[str, Said]:
        """Shard -> what it says of these blocks; of the shards that answer."""
        shards, wanted = self._shards(), sorted(keys)
        answers = await asyncio.gather(*(self._holders(u, wanted) for u in shards.values()), return_exceptions=True)
        _raise_defects(answers)
        return {s: a for s, a in zip(shards, answers, strict=True) if isinstance(a, dict)}

    async def kept(self) -> Kept:
        """The blocks every shard knows of at this moment."""
        arrivals = await self.arrivals()
        return Kept.since(arrivals, await self.said({key for came in arrivals.values() for key in came}))

    def _keys(self, tables: Mapping[str, Table], full: bool) -> list[int]:
        held = sorted({key for table in tables.values() for key in table})
        gone = list(self.gone.keys)
        if not full:
            held = self._chance.sample(held, min(SAMPLE, len(held)))
            gone = self._chance.sample(gone, min(SAMPLE, len(gone)))
        return held + gone

    def _shuffled(self, keys: Iterable[int]) -> list[int]:
        return self._chance.sample(ordered := sorted(keys), len(ordered))

    async def _of_engines(self, what: str) -> dict[str, dict[int, int]]:
        engines = self._engines()
        answers = await asyncio.gather(*(self._table(url, what) for url in engines.values()), return_exceptions=True)
        _raise_defects(answers)
        return {e: a for e, a in zip(engines, answers, strict=True) if isinstance(a, dict)}

    async def _table(self, url: str, what: str) -> dict[int, int]:
        (rank,) = (await self._get(f"{url}/debug/block_table"))["ranks"]
        return {int(key): number for key, number in rank[what].items()}

    async def _ask(self, url: str, keys: Sequence[int], tables: Mapping[str, Sequence[int]]) -> Asked:
        engines = {e["id"]: e for e in (await self._get(f"{url}/v1/engines"))["engines"]}
        matched = {}
        for engine, table in tables.items():
            body = {"model": MODEL, "keys": [str(key) for key in table], "engines": [engine]}
            answer = await self._post(f"{url}/v1/match", body) if table else {"engines": []}
            matched[engine] = sum(m["blocks"] for m in answer["engines"])
        return Asked(engines, keys, await self._holders(url, keys), matched)

    async def _holders(self, url: str, keys: Sequence[int]) -> Said:
        said: Said = {}
        for start in range(0, len(keys), KEYS_A_REQUEST):
            body = {"model": MODEL, "keys": [str(key) for key in keys[start : start + KEYS_A_REQUEST]]}
            for block in (await self._post(f"{url}/v1/blocks", body))["blocks"]:
                key = int(block["key"])
                for holder in block["holders"]:
                    table = said.setdefault(holder["engine"], {})
                    table[key] = table.get(key, 0) + holder["copies"]
        return said

    async def _get(self, url: str) -> Any:
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_WITHIN_S)) as response:
            return await _read(response)

    async def _post(self, url: str, body: Mapping[str, Any]) -> Any:
        async with self._session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=ASK_WITHIN_S)) as response:
            return await _read(response)


async def _read(response: aiohttp.ClientResponse) -> Any:
    """Raises `ValueError` for what is no answer."""
    if response.status != 200:
        raise ValueError(f"{response.url}: {response.status} {(await response.text())[:200]}")
    return await response.json()


def _verdict(shard: str, engine: str, asked: Asked, tables: Sequence[Table], likely: Sequence[int]) -> Verdict:
    """`likely`: the blocks that were looked up, in that order."""
    view = asked.engines.get(engine, {})
    true = settled(tables, asked.keys)
    said = asked.said.get(engine, {})
    # A lookup ends at the first block it does not find: what it says of those after one that has gone proves nothing.
    steady = next((n for n, key in enumerate(likely) if not tables[-1].get(key)), len(likely))
    return Verdict(
        shard,
        engine,
        sync=view.get("sync", "not known"),
        reason=view.get("inexact_reason", ""),
        difference=compare(true, {key: said.get(key, 0) for key in true}),
        matched=min(asked.matched[engine], steady),
        held=steady,
    )


def _raise_defects(answers: Iterable[object]) -> None:
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, FAILURES):
            raise answer
