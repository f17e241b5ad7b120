"""A shard that has lost an engine without knowing it: what it still has to write is refused, however late it comes."""

from __future__ import annotations

import signal
from itertools import count
from pathlib import Path

from kvatlas_indexer.core.ownership import winner
from kvatlas_loadtest.valkey import Valkey
from tests.integration.fault_kit import flags
from tests.integration.processes import indexer, until
from tests.integration.shard_kit import DEADLINE_S, Shards, config, shards


async def test_writes_that_were_held_up_until_another_shard_owned_the_engines(single: Valkey) -> None:
    async with shards(single.url, "one", "two", engines=[config(n) for n in range(4)]) as run:
        await run.spread()
        await run.load()
        await run.agree("after a load")
        cut = run.owner(run.engines[0])
        (other,) = {"one", "two"} - {cut}
        theirs = {engine.address for engine in run.engines if run.owner(engine) == cut}

        run.relays[cut].cut()
        await run.load()  # what comes of it waits before the store, on the wire and in memory
        await until(
            lambda: theirs <= {known.id.address for known in run.running[other].index.known()},
            f"{other} to own what {cut} owned",
            DEADLINE_S,
        )
        await run.load()
        paused = run.running.pop(cut)
        await run.agree("after the lease ran out")

        run.running[cut] = paused
        run.relays[cut].mend()
        await run.spread()  # it sees that it has lost them, and is given back what falls to it
        await run.agree("after the network was whole again")
        await run.load()
        await run.agree("with load after that")


async def test_a_process_that_was_stopped_for_longer_than_its_lease(single: Valkey, tmp_path: Path) -> None:
    async with shards(single.url, "one", engines=[config(n) for n in range(3)]) as run:
        await run.spread()
        name = next(n for n in (f"stopped-{i}" for i in count()) if 0 < len(falls_to(n, "one", run)) < 3)
        its = falls_to(name, "one", run)
        listed = [flag for engine in run.engines for flag in flags(engine)]
        store = ("--store", single.url, "--store-prefix", run.prefix, "--shard", name)
        async with indexer(tmp_path, name, *listed, *store) as process:
            await until(lambda: run.unowned() == its, "the process to take what falls to it", DEADLINE_S)
            await run.load()
            process.signal(signal.SIGSTOP)
            await run.load()
            await until(lambda: not run.unowned(), "the other shard to own everything, after the lease", DEADLINE_S)
            await run.load()
            await run.agree("while it was stopped")
            process.signal(signal.SIGCONT)
            await until(lambda: run.unowned() == its, "the process to be given back what falls to it", DEADLINE_S)
            await run.load()
            await run.agree("after it went on")
            process.assert_sound()


def falls_to(name: str, other: str, run: Shards) -> set[str]:
    return {engine.address for engine in run.engines if winner(engine.address, {name, other}) == name}
