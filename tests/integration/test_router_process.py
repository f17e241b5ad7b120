"""The router as a process: settings refused, started, drained."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from tests.integration.processes import DEADLINE_S
from tests.integration.router_kit import CHAT, EVENT_STREAM, NO_INDEXER, ScriptedEngine, Seen, chunk

START_S = 60.0  # a busy machine imports slowly


@asynccontextmanager
async def process(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "kvatlas_router", "--host", "127.0.0.1", "--port", "0", "--admin-port", "0", *argv)
    found = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        yield found
    finally:
        if found.returncode is None:
            found.kill()
        await found.wait()


async def line_with(found: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    assert found.stderr is not None
    async with asyncio.timeout(START_S):
        async for text in found.stderr:
            line: dict[str, object] = json.loads(text)
            if line["event"] == event:
                return line
    raise AssertionError(f"the process never said {event!r}")


async def test_sigterm_lets_a_stream_end_and_nothing_of_the_prompt_is_logged() -> None:
    go_on = asyncio.Event()

    async def when_told(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        await go_on.wait()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()

    async with ScriptedEngine(when_told) as engine:
        flags = ("--engine", engine.address, *NO_INDEXER, "--drain-delay-s", "0.1")
        async with process(*flags) as found, aiohttp.ClientSession() as http:
            port = (await line_with(found, "router listens"))["port"]
            body = CHAT | {"messages": [{"role": "user", "content": "SECRET"}]}
            reply = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            await reply.content.readany()
            found.send_signal(signal.SIGTERM)
            await line_with(found, "draining")
            go_on.set()
            assert await reply.content.read() == b"data: [DONE]\n\n"
            handled = await line_with(found, "request handled")
            assert (handled["outcome"], handled["engine"]) == ("ok", engine.address)
            assert "SECRET" not in json.dumps(handled)
            async with asyncio.timeout(DEADLINE_S):
                assert await found.wait() == 0


async def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    async with ScriptedEngine() as holder, process(*NO_INDEXER, "--port", str(holder.port)) as found:
        assert found.stderr is not None
        async with asyncio.timeout(START_S):
            said = await found.stderr.read()
            assert await found.wait() == 1
        assert b"Address already in use" in said.splitlines()[-1]
        assert b"Traceback" not in said
