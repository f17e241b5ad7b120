"""`kvatlas up`: indexer and router in one process, with the memory store: nothing to install, nothing to configure."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import uvloop
from pydantic import Field

from kvatlas_cli import local
from kvatlas_common.lasting import keep_what_is_built
from kvatlas_common.logs import setup_logs
from kvatlas_common.settings import load
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig
from kvatlas_router.settings import RouterSettings

DESCRIPTION = (
    "Runs an indexer and a router in one process, in front of the engines given with --engine, of those that connect "
    "to --zmq-listen, and of --simulate N simulated ones."
)


class UpSettings(IndexerSettings, RouterSettings):
    """This command."""

    simulate: int = Field(0, ge=0, le=64, description="simulated engines to run besides, for trying things out")


def main(argv: Sequence[str]) -> int:
    """Exit status 0 after SIGTERM or SIGINT, 1 if a port cannot be had, 2 for settings that cannot be used."""
    settings = load(UpSettings, argv, os.environ, prog="kvatlas up", description=DESCRIPTION)
    setup_logs(sys.stderr, settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_up(settings, os.environ))
    except OSError as error:
        print(f"kvatlas up: {error}", file=sys.stderr)
        return 1
    return 0


async def _up(settings: UpSettings, environ: Mapping[str, str]) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    configs = [EngineConfig(seed=number) for number in range(settings.simulate)]
    async with local.simulated(configs) as engines, local.serving(settings, settings, engines, environ) as stack:
        keep_what_is_built()
        _say(settings, stack)
        waiting = asyncio.ensure_future(asked.wait())
        failed = asyncio.ensure_future(stack.indexer.until_failed())
        done, pending = await asyncio.wait({waiting, failed}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()


def _say(settings: UpSettings, stack: local.LocalStack) -> None:
    print(f"router    {stack.url}  (OpenAI-compatible)", file=sys.stderr)
    print(f"explain   {stack.admin_url}/debug/route", file=sys.stderr)
    print(f"index     http://{local.reachable(stack.indexer.rest_address)}/", file=sys.stderr)
    for endpoint in stack.indexer.zmq_endpoints:
        print(f"engines   publish KV events to {endpoint}", file=sys.stderr)
    if stack.engines:
        body = '{"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}'
        print(f"try       curl -si {stack.url}/v1/chat/completions -d '{body}'", file=sys.stderr)
