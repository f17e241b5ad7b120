"""What is done to whom, and for how long: all of it from a seed. Pure.

`loses_events`: while it lasts, messages of engines may be lost for good where there is no replay endpoint to ask. Such
an engine must not be called exact any more. After any other fault it is exact again, with replay or without: whoever
applied its messages still knows what they came to.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

STOPPED_S = 5.0
FRAME_FAULTS_S = 4.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """`shared`: it takes shards over Redis. `keeps_cached`: the cached share is held against the undisturbed one."""

    name: str
    text: str
    loses_events: bool = True
    shared: bool = False
    keeps_cached: bool = False


SCENARIOS = (
    Scenario("rolling-restart", "SIGTERM and restart of every shard and router, one by one", keeps_cached=True),
    Scenario("scale", "SIGTERM of one of three shards; later there are three again", shared=True),
    Scenario("kill-owner", "kill -9 of a shard that owns engines; later it is back"),
    Scenario("kill-idle", "kill -9 of the shard that owns fewest engines; later it is back", shared=True),
    Scenario("kill-router", "kill -9 of a router; later it is back", loses_events=False),
    Scenario("restart-valkey", "kill -9 of Valkey, which keeps nothing; later it is back", False, shared=True),
    Scenario("stop-shard", "SIGSTOP of a shard that owns engines, for 5 s"),
    Scenario("stop-engine", "SIGSTOP of an engine, for 5 s", loses_events=False),
    Scenario("stop-valkey", "SIGSTOP of Valkey, for 5 s", loses_events=False, shared=True),
    Scenario("flushall", "FLUSHALL", loses_events=False, shared=True),
    Scenario("lose-frames", "event messages of two engines are lost"),
    Scenario("repeat-frames", "event messages of two engines come twice", loses_events=False),
    Scenario("reorder-frames", "event messages of two engines come after the next one"),
    Scenario("cut-network", "nothing passes between one shard and Valkey, for 5 s", shared=True),
    Scenario("kill-engine", "kill -9 of two engines, one dialled, one connecting; later they are back"),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@dataclass(frozen=True, slots=True)
class Fault:
    """One scenario as it will be played. `pick` chooses the victim: 0..1 of the candidates there are then."""

    scenario: Scenario
    replay: bool
    pick: float
    down_s: float
    share: float  # of event messages that are lost, repeated or late
    keeps_cached: bool  # it must cost next to nothing of the cached share


def schedule(
    seed: int, *, replay: bool, redis: bool, only: Collection[str] = (), scale: float = 1.0
) -> tuple[Fault, ...]:
    """The faults of one deployment, in the order in which they come.

    A scenario is played in the same way whichever others are. Raises `ValueError` for a name that is none.
    """
    unknown = sorted(set(only) - BY_NAME.keys())
    if unknown:
        raise ValueError(f"no scenario is named {', '.join(unknown)}; there are: {', '.join(BY_NAME)}")
    wanted = [s for s in SCENARIOS if (not only or s.name in only) and (redis or not s.shared)]
    return tuple(_played(seed, scenario, scale, replay=replay, redis=redis) for scenario in wanted)


def victim(fault: Fault, candidates: Sequence[str]) -> str:
    """The one that is hit. `candidates` in any order, at least one."""
    ordered = sorted(candidates)
    return ordered[min(int(fault.pick * len(ordered)), len(ordered) - 1)]


def _played(seed: int, scenario: Scenario, scale: float, *, replay: bool, redis: bool) -> Fault:
    chance = random.Random(f"{seed}/{scenario.name}/{replay}")
    return Fault(
        scenario,
        replay,
        pick=chance.random(),
        down_s=chance.uniform(2.0, 4.0) * scale,
        share=chance.uniform(0.15, 0.4),
        keeps_cached=scenario.keeps_cached and replay and redis,
    )
