"""Simulated engines, several in one process: `python -m kvatlas_loadtest.soak.engines --count 4`. Prints where they are
as one JSON line when they are ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvloop

from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import TimeModel


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.soak.engines", description=__doc__)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=320, help="of each engine's pool")
    parser.add_argument("--speed", type=float, default=1.0)
    asked = parser.parse_args(argv)
    config = EngineConfig(limits=EngineLimits(num_blocks=asked.blocks), time_model=TimeModel(speed=asked.speed))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(asked.count, config))


async def _serve(count: int, config: EngineConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        engines: list[SimulatedEngine] = []
        for _ in range(count):
            shared = (engines[0].prompter, engines[0].vocabulary) if engines else ()
            engines.append(await stack.enter_async_context(SimulatedEngine(config, *shared)))
        flags = [f"{e.address},events={e.events_endpoint},replay={e.replay_endpoint}" for e in engines]
        print(json.dumps({"engines": flags}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    main()
