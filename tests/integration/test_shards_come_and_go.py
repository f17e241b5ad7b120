"""Shards of one index that join, leave and die, and a store that loses everything: the engines' own block tables are
what every shard answers, copies and all, a moment later."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas_loadtest.valkey import Valkey
from tests.integration.shard_kit import config, no_lease_runs_out, shards


async def test_shards_that_die_join_and_leave_and_a_store_that_forgets(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        async with shards(server.url, "one", "two", engines=[config(n) for n in range(4)]) as run:
            await run.spread()
            await run.load()
            await run.agree("after a load")
            assert any(2 in run.truth(engine).values() for engine in run.engines), "no copies: the load is too tame"

            run.crash(run.owner(run.engines[0]))
            await run.load()
            await run.agree("after a shard died")

            await run.add("three")
            await run.load()
            await run.agree("after a shard joined")

            with server.client() as client:
                client.flushall()
            await run.load()
            await run.agree("after the store lost everything")

            server.stop()
            await run.load()
            server.start()
            await run.agree("after the store was away and came back empty")


async def test_a_shard_that_joins_takes_what_falls_to_it_and_one_that_leaves_hands_over_at_once(
    single: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_lease_runs_out(monkeypatch)
    async with shards(single.url, "one", "two", engines=[config(n) for n in range(6)]) as run:
        await run.spread()
        for leaving, joining in (("one", "three"), ("two", "four")):
            before = run.owners()
            await run.add(joining)
            after = await run.spread()
            assert all(after[engine] == {joining} for engine in before if before[engine] != after[engine])
            await run.load(12)
            await run.leave(leaving)
            await run.spread()
            await run.load(12)
            await run.agree(f"after {leaving} left")
