"""Engines that go from one shard to another with all that is particular to them: they connect to us, their hashes
cannot be reproduced, their entries are in doubt, their store is a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_indexer.app import Indexer
from kvatlas_indexer.core import ownership
from kvatlas_loadtest.chaos.wires import TcpRelay
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.events import WireVersion
from kvatlas_loadtest.valkey import Valkey
from tests.integration.processes import until
from tests.integration.shard_kit import DEADLINE_S, Shards, config, no_lease_runs_out, shards


def zmq(shard: Indexer) -> str:
    return shard.zmq_endpoints[0].removeprefix("tcp://").replace("0.0.0.0", "127.0.0.1")


def connecting(number: int, address: str) -> EngineConfig:
    return config(number, events_endpoint=f"tcp://{address}")


async def heard_by(run: Shards, name: str) -> None:
    """What a publisher says before its connection is up is lost, and shows with the next message: it speaks until all
    it holds is known.
    """

    async def look() -> bool:
        await run.load(len(run.engines))
        if run.owners() != {engine.address: {name} for engine in run.engines}:
            return False
        with contextlib.suppress(AssertionError):
            await run.agree("what it spoke of to be known", within_s=0.5)
            return True
        return False

    await until(look, f"{name} to own, and know, every engine that speaks to it", DEADLINE_S)


async def test_listened_engines_belong_to_the_shard_their_service_leads_to(
    single: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They connect to one address for all shards, and live on when another shard answers there, which takes them."""
    no_lease_runs_out(monkeypatch)
    target: list[str] = []
    service = TcpRelay(lambda: target)
    await service.start()
    engines = [connecting(n, service.address) for n in range(3)]
    async with shards(single.url, engines=engines, dialled=False) as run:
        first = await run.add("first")
        second = await run.add("second")
        target.append(zmq(first))
        await heard_by(run, "first")
        await run.agree("after a load")

        target[:] = [zmq(second)]
        run.crash("first")
        await heard_by(run, "second")
        await run.load()
        await run.agree("after the shard they spoke to died")
    await service.close()


async def test_a_listened_engine_that_restarts_towards_another_shard(single: Valkey) -> None:
    async with shards(single.url, engines=[config(0)], dialled=False) as run:
        first = await run.add("first")
        await run.replace(0, connecting(1, zmq(first)))
        await heard_by(run, "first")
        await run.load()
        await run.agree("after a load")
        second = await run.add("second")
        run.crash("first")
        await run.replace(0, connecting(2, zmq(second)))
        await heard_by(run, "second")
        await run.load()
        await run.agree("after its shard died and it began anew")


async def test_a_listened_engine_whose_shard_dies_is_somebodys_even_if_nobody_hears_it(
    single: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lives on without a word, one has died with its shard, and neither is in a list."""
    monkeypatch.setattr(ownership, "ORPHANED_S", 1.0)
    async with shards(single.url, engines=[config(0), config(1)], dialled=False, listed=False) as run:
        first = await run.add("first")
        silent, dead = [await run.replace(n, connecting(2 + n, zmq(first))) for n in range(2)]
        await until(lambda: _speak(run, {"first"}), "both to be known to the shard they speak to", DEADLINE_S)
        held = [await run.written(engine) for engine in (silent, dead)]
        assert all(held)
        await run.add("second", forget_after_s=1.0)
        run.crash("first")
        await dead.crash()

        async def settled() -> bool:
            return await run.health("second") == {silent.address: "ready"}

        await until(settled, "the dead one to be forgotten", DEADLINE_S)
        assert run.owners() == {silent.address: {"second"}, dead.address: set()}
        assert await run.record(dead) is None
        assert await run.kept(silent) == held[0]


async def test_a_dialled_engine_taken_off_every_list_while_no_shard_ran_is_forgotten(
    single: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "ORPHANED_S", 0.5)
    async with shards(single.url, "first", engines=[config(0), config(1)]) as run:
        await run.spread()
        await run.load(4)
        await run.agree("after a load")
        run.crash("first")
        gone = run.engines.pop()
        await run.add("second")
        await run.spread()

        async def forgotten() -> bool:
            return await run.record(gone) is None

        await until(forgotten, "the one in no list to be forgotten", DEADLINE_S)
        await run.agree("the other one stays")


async def _speak(run: Shards, owners: set[str]) -> bool:
    await run.load(len(run.engines))
    return all(run.owners()[engine.address] == owners for engine in run.engines)


def recomputed(run: Shards) -> Mapping[str, Mapping[int, int]]:
    """What each engine holds, under the names lookups have for them: hashed again from its prompts."""
    names: dict[str, dict[int, int]] = {}
    for engine, prompt in run.asked:
        of = names.setdefault(engine.address, {})
        if not run.profile(engine):
            continue  # its new owner has not seen a root of it yet
        ours = HashProfile.parse(run.profile(engine))
        theirs, named = (prompt_keys(p, [*prompt, 0]).tolist() for p in (engine.config.profile(), ours))
        of.update(zip(theirs, named, strict=True))
    return names


async def test_engines_whose_hashes_cannot_be_reproduced(single: Valkey) -> None:
    """Their names go with their owner: the next one asks the engine for everything it ever published."""
    engines = [config(n, hash_seed=f"drawn at random: {n}", version=WireVersion.V0_27) for n in range(2)]
    async with shards(single.url, "one", "two", engines=engines) as run:
        await run.spread()
        await run.load(6)

        def truth(engine: SimulatedEngine) -> dict[int, int]:
            names = recomputed(run)[engine.address]
            return {names.get(key, 0): copies for key, copies in engine.block_table().items()}

        run.truth = truth
        await run.agree("after a load")
        assert all("recomputed" in run.profile(engine) for engine in run.engines)
        await run.leave(run.owner(run.engines[0]))
        await run.spread()
        await run.load(6)
        await run.agree("after a shard left")


async def test_entries_in_doubt_stay_in_doubt_in_other_hands(single: Valkey) -> None:
    async with shards(single.url, "one", "two", engines=[config(0, replay_endpoint=None)]) as run:
        (engine,) = run.engines
        await run.spread()
        await run.load(4)
        await run.agree("after a load")
        engine.publisher().faults.drop = 1
        await run.load(6)
        held, record = await run.written(engine), await run.record(engine)
        assert run.doubtful(engine)
        assert record is not None
        assert record.sync == "inexact"
        assert sum(len(place.doubts) for place in record.places) == 1

        await run.leave(run.owner(engine))
        await run.spread()
        assert run.doubtful(engine)
        assert await run.kept(engine) == held
        assert (taken := await run.record(engine)) is not None
        assert taken.places == record.places
        assert (taken.sync, taken.epoch) == ("inexact", record.epoch)

        async with run.http.post(f"{engine.url}/reset_prefix_cache") as response:
            assert response.status == 200
        await run.load(4)
        await run.agree("after a clear that says all")


async def test_on_a_cluster_that_loses_a_node_s_data(cluster: list[Valkey]) -> None:
    url = f"redis+cluster://{','.join(server.address for server in cluster)}"
    async with shards(url, "one", "two", engines=[config(n) for n in range(3)]) as run:
        await run.spread()
        await run.load(12)
        await run.agree("after a load")
        with cluster[1].client() as client:
            client.flushall()
        await run.load(12)
        await run.agree("after a node lost everything")
        await run.leave("one")
        await run.add("three")
        await run.spread()
        await run.load(12)
        await run.agree("after one left and another joined")
