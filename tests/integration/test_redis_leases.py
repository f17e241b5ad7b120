"""Leases on a real Valkey: who is heard, who holds what, and who has been away."""

from __future__ import annotations

import asyncio

from kvatlas_indexer.adapters.redis_leases import RedisLeases
from kvatlas_indexer.core.ownership import Lease
from kvatlas_loadtest.valkey import Valkey
from tests.integration.redis_kit import opened

ENGINE = "10.0.0.1:8000"
SHORT_S = 0.5
HELD_S = 1.5  # to be renewed in time on a busy machine too
LONG_S = 60.0


async def test_a_shard_is_told_that_it_has_been_away(single: Valkey) -> None:
    """After a wipe, or a time in which nobody could be heard, each shard is: not the first one alone."""
    async with opened(single.url) as client:
        first, second = (RedisLeases(client, client.prefix, name, lease_s=LONG_S) for name in ("first", "second"))
        assert (await first.beat([], {})).returned
        beat = await second.beat([], {})
        assert beat.returned
        assert beat.live == {"first", "second"}
        assert not (await first.beat([], {})).returned
        assert not (await second.beat([], {})).returned
        with single.client() as admin:
            admin.delete(f"{client.prefix}{{0}}shards")
        assert [(await shard.beat([], {})).returned for shard in (first, second)] == [True, True]
        away = [RedisLeases(client, client.prefix, name, lease_s=SHORT_S) for name in ("first", "second")]
        await asyncio.sleep(SHORT_S * 1.2)
        assert [(await shard.beat([], {})).returned for shard in away] == [True, True]
        assert [(await shard.beat([], {})).returned for shard in (first, second)] == [False, False]


async def test_a_lease_is_one_shards_until_it_lets_go_or_is_forced(single: Valkey) -> None:
    async with opened(single.url) as client:
        first, second = (RedisLeases(client, client.prefix, name, lease_s=LONG_S) for name in ("first", "second"))
        fence = await first.acquire(ENGINE, force=False)
        assert fence is not None
        assert await second.acquire(ENGINE, force=False) is None
        assert (await second.beat([ENGINE], {})).leases == {ENGINE: Lease("first", fence)}
        forced = await second.acquire(ENGINE, force=True)
        assert forced is not None
        assert forced > fence
        await first.release(ENGINE, fence)  # not its own any more
        assert (await first.beat([ENGINE], {ENGINE: fence})).leases == {ENGINE: Lease("second", forced)}
        await second.leave([ENGINE])
        assert (await first.beat([ENGINE], {})).leases == {}
        assert (await first.beat([ENGINE], {})).live == {"first"}
        again = await first.acquire(ENGINE, force=False, above=forced + 10**9)
        assert again == forced + 10**9 + 1
        await first.release(ENGINE, again)
        assert (await first.beat([ENGINE], {})).leases == {}


async def test_a_lease_lives_as_long_as_its_owner_is_heard(single: Valkey) -> None:
    async with opened(single.url) as client:
        owner, other = (RedisLeases(client, client.prefix, name, lease_s=HELD_S) for name in ("owner", "other"))
        fence = await owner.acquire(ENGINE, force=False)
        assert fence is not None
        for _ in range(4):
            await asyncio.sleep(HELD_S / 3)
            assert (await owner.beat([ENGINE], {ENGINE: fence})).leases[ENGINE].shard == "owner"
        async with asyncio.timeout(20 * HELD_S):
            while (await other.beat([ENGINE], {})).leases:
                await asyncio.sleep(HELD_S / 10)
        taken = await other.acquire(ENGINE, force=False)
        assert taken is not None
        assert taken > fence
