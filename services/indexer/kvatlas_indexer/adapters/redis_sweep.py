"""The sweep: takes retired slots out of the blocks, and renews the TTL of blocks that somebody alive still holds.

It walks every partition with SCAN, a thousand blocks a step; one shard sweeps at a time. How far it is stays
in Redis, so that any shard goes on where another stopped. A pass takes out the slots that were retired when it began;
when it ends they leave the set of the dead. There is a pass when slots have been retired, and in any case every quarter
of the block TTL. After each step the sweeper rests so long that it takes no more than its share of the server's time.

A cursor of SCAN means something only to the process that gave it: after a restart or a fail-over the partition is
walked from its beginning.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvatlas_indexer.adapters.redis_blocks import RECORDS, Holders, block_keys, mget_command, scan_command
from kvatlas_indexer.adapters.redis_client import RedisClient, Request, StoreUnavailable, parse_info
from kvatlas_indexer.adapters.redis_packing import Keys, command
from kvatlas_indexer.adapters.redis_scripts import Script
from kvatlas_indexer.adapters.redis_writes import TTL_JITTER

STEP_COUNT = 1000
LOCK_MS = 15_000
REPEATS_MAX = 8
"""How often blocks that changed under the sweep are looked at again before the pass is called incomplete."""
IDLE_S = 1.0
STORE_RETRY_S = 1.0

_SWEEP = Script.load("sweep")
_SWEEPER = Script.load("sweeper")

Numbers = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did. `pause_s`: how long to wait before the next, to stay within the share."""

    pause_s: float
    sweeping: bool = False  # this shard is the sweeper, and there was something to do
    finished: bool = False  # a pass ended with this step
    blocks: int = 0
    stripped: int = 0
    renewed: int = 0


@dataclass(slots=True)
class _Progress:
    """How far the sweep is, as Redis holds it. No partition: no pass is under way."""

    partition: int | None
    cursor: bytes
    server: str  # the run id of the process that gave the cursor
    began: float  # the pass, by Redis's clock
    dead: Numbers
    incomplete: bool

    @classmethod
    def of(cls, flat: list[bytes]) -> _Progress:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        partition = fields.get(b"partition", b"")
        return cls(
            int(partition) if partition else None,
            fields.get(b"cursor", b"0"),
            fields.get(b"server", b"").decode(),
            float(fields.get(b"began", 0)),
            np.frombuffer(fields.get(b"dead", b""), dtype=">u4").astype(np.uint32),
            fields.get(b"incomplete") == b"1",
        )

    def fields(self) -> list[bytes | str]:
        return [
            *("partition", "" if self.partition is None else str(self.partition)),
            *("cursor", self.cursor, "server", self.server, "began", str(self.began)),
            *("dead", self.dead.astype(">u4").tobytes(), "incomplete", str(int(self.incomplete))),
        ]


class RedisSweep:
    """`name`: of this shard. `share`: how much of the server's time it may take, 0..1."""

    def __init__(
        self,
        client: RedisClient,
        name: str,
        *,
        block_ttl_s: float,
        share: float = 0.05,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._name = name
        self._ttl_s = block_ttl_s
        self._share = share
        self._chance = chance
        self._blocks = [block_keys(client, partition) for partition in range(client.partitions)]
        self._dead = client.key(0, "dead")
        self._keys = [client.key(0, "sweeper"), client.key(0, "sweep")]

    async def step(self, live: Collection[int]) -> Step:
        """`live`: the slots in the records of all engines. Raises `StoreUnavailable`; the next step goes on."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        mine = await self._note()
        if mine is None:
            return Step(IDLE_S)
        now, progress = mine
        alive = np.fromiter(live, dtype=np.uint32)
        if progress.partition is None and not await self._begin(progress, now, alive):
            return Step(IDLE_S)
        blocks, stripped, renewed = await self._walk(progress, alive)
        finished = progress.partition is None
        if finished:
            await self._bury(progress)
        await self._note(progress)
        spent = loop.time() - began
        return Step(spent * (1 / self._share - 1), True, finished, blocks, stripped, renewed)

    async def _note(self, progress: _Progress | None = None) -> tuple[float, _Progress] | None:
        """Stay or become the sweeper; None: somebody else is."""
        fields = progress.fields() if progress else []
        reply = await self._client.script(0, _SWEEPER, self._keys, [self._name, LOCK_MS, *fields])
        if reply is None:
            return None
        now, flat = reply
        return float(now), _Progress.of(flat)

    async def _begin(self, progress: _Progress, now: float, alive: Numbers) -> bool:
        """Begin a pass, if there is a reason to."""
        members = np.array([int(n) for n in await self._client.command(0, "SMEMBERS", self._dead)], dtype=np.uint32)
        dead = np.setdiff1d(members, alive)  # retired and still in a record: its owner has not finished
        if not len(dead) and 0 <= now - progress.began < self._ttl_s / 4:
            return False
        progress.partition, progress.cursor, progress.server = 0, b"0", ""
        progress.began, progress.dead, progress.incomplete = now, dead, False
        return True

    async def _walk(self, progress: _Progress, alive: Numbers) -> tuple[int, int, int]:
        """The next blocks of the partition: how many, how many of them stripped, how many renewed."""
        partition = progress.partition
        assert partition is not None
        scan = scan_command(self._client, partition, progress.cursor, STEP_COUNT)
        ((info, (cursor, names)),) = await self._client.round(
            [Request(partition, [command("INFO", "server"), scan], 2)]
        )
        server = parse_info(info)["run_id"]
        if progress.cursor != b"0" and server != progress.server:
            progress.cursor = b"0"
            return 0, 0, 0
        progress.server, progress.cursor = server, cursor
        counts = await self._clean(progress, self._blocks[partition].keys(names), alive)
        if cursor == b"0":
            progress.partition = partition + 1 if partition + 1 < self._client.partitions else None
        return counts

    async def _clean(self, progress: _Progress, keys: Keys, alive: Numbers) -> tuple[int, int, int]:
        partition = progress.partition
        assert partition is not None
        stripped = renewed = 0
        found = len(keys)
        for _ in range(REPEATS_MAX):
            if not len(keys):
                return found, stripped, renewed
            blocks = self._blocks[partition]
            ((values,),) = await self._client.round([Request(partition, [mget_command(blocks, keys)])])
            renew, strip = sorted_out(values, progress.dead, alive)
            again = await self._apply(partition, keys, renew, strip)
            stripped += len(strip) - len(again)
            renewed += len(renew)
            keys = keys[again]
        progress.incomplete = True
        return found, stripped, renewed

    async def _apply(
        self, partition: int, keys: Keys, renew: list[int], strip: list[tuple[int, bytes, bytes]]
    ) -> list[int]:
        """Which of `strip` had changed."""
        if not renew and not strip:
            return []
        names = [self._blocks[partition].prefix + int(keys[i]).to_bytes(8, "big") for i in renew]
        names += [self._blocks[partition].prefix + int(keys[i]).to_bytes(8, "big") for i, _, _ in strip]
        ttl = round(self._ttl_s * (1 + TTL_JITTER * (2 * self._chance() - 1)))
        values = [value for _, old, new in strip for value in (old, new)]
        changed: list[int] = await self._client.script(partition, _SWEEP, names, [max(1, ttl), len(renew), *values])
        return [strip[place - len(renew) - 1][0] for place in changed]

    async def _bury(self, progress: _Progress) -> None:
        """The pass is over: what it took out is nowhere any more."""
        if len(progress.dead) and not progress.incomplete:
            await self._client.command(0, "SREM", self._dead, *progress.dead.tolist())
        progress.dead = progress.dead[:0]


def sorted_out(values: list[Any], dead: Numbers, alive: Numbers) -> tuple[list[int], list[tuple[int, bytes, bytes]]]:
    """Which values are to be renewed, and which are to change: (place, old, new)."""
    held = Holders.of(values)
    is_dead = np.isin(held.numbers, dead)
    change = np.unique(held.block[is_dead])
    keep = np.unique(held.block[np.isin(held.numbers, alive)])
    strip: list[tuple[int, bytes, bytes]] = []
    for place in change.tolist():
        old = values[place]
        records = np.frombuffer(old, dtype=RECORDS)
        strip.append((place, old, records[~np.isin(records["number"], dead)].tobytes()))
    return np.setdiff1d(keep, change).tolist(), strip


async def sweep_forever(sweep: RedisSweep, live_slots: Callable[[], Collection[int]]) -> None:
    """`live_slots`: in the records of all engines, as they are at each step."""
    while True:
        try:
            step = await sweep.step(live_slots())
            await asyncio.sleep(step.pause_s)
        except StoreUnavailable:
            await asyncio.sleep(STORE_RETRY_S)
