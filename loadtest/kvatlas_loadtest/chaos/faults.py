"""The faults themselves: what is done to the deployment, and where each counts as ended.

A fault is over when the process is back, or its successor holds the lease. At each such moment `stage.recovered(...)`
waits for the index to be right again, and notes how long that took.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from kvatlas_loadtest.chaos.deployment import Deployment, ShardNode
from kvatlas_loadtest.chaos.plan import FRAME_FAULTS_S, STOPPED_S, Fault, victim
from kvatlas_loadtest.chaos.wires import FrameFaults

TAKEOVER_WITHIN_S = 10.0
LEASES = "*{0}o*"  # docs/adr/0005-redis.md, 'What is in Redis'


class Stage(Protocol):
    """What a fault has around it."""

    deployment: Deployment
    fault: Fault

    async def recovered(self, ended: str) -> None:
        """The fault, or this part of it, is over now, because of `ended`."""
        ...

    def note(self, text: str) -> None:
        """Something the reader of the report should know."""
        ...

    def epoch_ended(self, engine: str) -> None:
        """The engine has lost its cache."""
        ...


Play = Callable[[Stage], Awaitable[None]]


async def owners(deployment: Deployment) -> dict[str, str]:
    """Engine -> the shard that holds its lease now."""
    if deployment.valkey is None:
        return {engine.address: deployment.shards[0].name for engine in deployment.engines}
    return await asyncio.to_thread(_leases, deployment)


def _leases(deployment: Deployment) -> dict[str, str]:
    assert deployment.valkey is not None
    found: dict[str, str] = {}
    with deployment.valkey.client() as client:
        for key in client.scan_iter(match=LEASES, count=1000):
            lease: Mapping[bytes, bytes] = client.hgetall(key) if client.type(key) == b"hash" else {}
            if b"shard" in lease:
                found[key.partition(b"}o")[2].decode()] = lease[b"shard"].decode()
    return found


async def _owner(stage: Stage) -> ShardNode:
    """A shard that owns engines."""
    deployment = stage.deployment
    owned = Counter((await owners(deployment)).values())
    name = victim(stage.fault, [shard.name for shard in deployment.shards if owned[shard.name]] or ["shard-0"])
    stage.note(f"{name}, which owned {owned[name]} of {len(deployment.engines)} engines")
    return next(shard for shard in deployment.shards if shard.name == name)


async def _taken_over(stage: Stage, shard: ShardNode) -> None:
    """Until others hold the leases of all engines."""
    if stage.deployment.valkey is None:
        return
    begun = time.monotonic()
    wanted = {engine.address for engine in stage.deployment.engines}
    while True:
        leases = await owners(stage.deployment)
        if shard.name not in leases.values() and wanted <= leases.keys():
            stage.note(f"leases taken over after {time.monotonic() - begun:.1f} s")
            return
        if time.monotonic() - begun > TAKEOVER_WITHIN_S:
            stage.note(f"leases not taken over within {TAKEOVER_WITHIN_S:g} s: {leases}")
            return
        await asyncio.sleep(0.02)


async def _kill_shard(stage: Stage, shard: ShardNode) -> None:
    shard.kill()
    if stage.deployment.options.redis:
        await _taken_over(stage, shard)
        await stage.recovered("successors hold the leases")
    else:
        await asyncio.sleep(stage.fault.down_s)
    await shard.start()
    await stage.recovered("the shard is back")


async def kill_owner(stage: Stage) -> None:
    await _kill_shard(stage, await _owner(stage))


async def kill_idle(stage: Stage) -> None:
    owned = Counter((await owners(stage.deployment)).values())
    shard = min(stage.deployment.shards, key=lambda s: (owned[s.name], s.name))
    stage.note(f"{shard.name}, which owned {owned[shard.name]} engines")
    await _kill_shard(stage, shard)


async def kill_router(stage: Stage) -> None:
    name = victim(stage.fault, [router.name for router in stage.deployment.routers])
    router = next(router for router in stage.deployment.routers if router.name == name)
    router.kill()
    await asyncio.sleep(stage.fault.down_s)
    await router.start()
    await stage.recovered("the router is back")


async def kill_engine(stage: Stage) -> None:
    plain = [engine for engine in stage.deployment.engines if engine.relay is None]
    dialled = victim(stage.fault, [engine.name for engine in plain if engine.dialled])
    killed = [engine for engine in plain if engine.name == dialled or not engine.dialled]
    for engine in killed:
        engine.kill()
        stage.epoch_ended(engine.address)
    await asyncio.sleep(stage.fault.down_s)
    await asyncio.gather(*(engine.start() for engine in killed))
    await stage.recovered("the engines are back")


async def stop_shard(stage: Stage) -> None:
    shard = await _owner(stage)
    shard.pause()
    await asyncio.sleep(STOPPED_S)
    shard.resume()
    await stage.recovered("it goes on")


async def stop_engine(stage: Stage) -> None:
    name = victim(stage.fault, [engine.name for engine in stage.deployment.engines])
    stage.note(name)
    engine = next(engine for engine in stage.deployment.engines if engine.name == name)
    engine.pause()
    await asyncio.sleep(STOPPED_S)
    engine.resume()
    await stage.recovered("it goes on")


async def restart_valkey(stage: Stage) -> None:
    valkey = stage.deployment.valkey
    assert valkey is not None
    valkey.stop()
    await asyncio.sleep(stage.fault.down_s)
    await asyncio.to_thread(valkey.start)
    await stage.recovered("Valkey is back, empty")


async def stop_valkey(stage: Stage) -> None:
    valkey = stage.deployment.valkey
    assert valkey is not None
    valkey.pause()
    await asyncio.sleep(STOPPED_S)
    valkey.resume()
    await stage.recovered("Valkey goes on")


async def flushall(stage: Stage) -> None:
    def flush() -> None:
        assert stage.deployment.valkey is not None
        with stage.deployment.valkey.client() as client:
            client.flushall()

    await asyncio.to_thread(flush)
    await stage.recovered("all keys are gone")


async def _frames(stage: Stage, faults: FrameFaults, ended: str) -> None:
    relayed = [engine.relay.frames for engine in stage.deployment.engines if engine.relay is not None]
    before = sum(frames.counts.hit for frames in relayed)
    for frames in relayed:
        frames.faults = faults
    await asyncio.sleep(FRAME_FAULTS_S)
    for frames in relayed:
        frames.faults = FrameFaults()
    stage.note(f"{sum(frames.counts.hit for frames in relayed) - before} messages hit")
    await stage.recovered(ended)


async def lose_frames(stage: Stage) -> None:
    await _frames(stage, FrameFaults(lost=stage.fault.share), "none are lost any more")


async def repeat_frames(stage: Stage) -> None:
    await _frames(stage, FrameFaults(twice=stage.fault.share), "none come twice any more")


async def reorder_frames(stage: Stage) -> None:
    await _frames(stage, FrameFaults(late=stage.fault.share), "none come late any more")


async def cut_network(stage: Stage) -> None:
    shard = await _owner(stage)
    assert shard.redis is not None
    shard.redis.cut()
    await asyncio.sleep(STOPPED_S)
    shard.redis.mend()
    await stage.recovered("the network is back")


async def rolling_restart(stage: Stage) -> None:
    for node in (*stage.deployment.shards, *stage.deployment.routers):
        status = await node.stop()
        if status != 0:
            stage.note(f"{node.name} ended with status {status}")
        await node.start()
    await stage.recovered("the last one is back")


async def scale(stage: Stage) -> None:
    shard = await _owner(stage)
    begun = time.monotonic()
    await shard.stop()
    stage.note(f"it ended after {time.monotonic() - begun:.1f} s")
    await _taken_over(stage, shard)
    await stage.recovered("two shards hold all leases")
    await shard.start()
    await stage.recovered("there are three again")


PLAYS: Mapping[str, Play] = {
    "kill-owner": kill_owner,
    "kill-idle": kill_idle,
    "kill-router": kill_router,
    "kill-engine": kill_engine,
    "restart-valkey": restart_valkey,
    "stop-shard": stop_shard,
    "stop-engine": stop_engine,
    "stop-valkey": stop_valkey,
    "flushall": flushall,
    "lose-frames": lose_frames,
    "repeat-frames": repeat_frames,
    "reorder-frames": reorder_frames,
    "cut-network": cut_network,
    "rolling-restart": rolling_restart,
    "scale": scale,
}
