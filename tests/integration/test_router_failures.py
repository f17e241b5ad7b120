"""Engines that fail in every way, and a router that goes: no request fails that another engine could serve."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from kvatlas_common.fleet import Health
from tests.integration.processes import DEADLINE_S
from tests.integration.router_kit import (
    CHAT,
    EVENT_STREAM,
    NO_INDEXER,
    Running,
    Script,
    ScriptedEngine,
    Seen,
    answer,
    chunk,
    eventually,
    hang_up,
    replying,
    routed,
    running,
    sse,
)

STREAM = CHAT | {"stream": True}
IMPATIENT = (*NO_INDEXER, "--first-byte-timeout-s", "0.3", "--idle-timeout-s", "0.3")


async def hang(_: Seen, __: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def head_then_hang_up(_: Seen, writer: asyncio.StreamWriter) -> None:
    """As a vLLM that dies while it computes the prompt: the stream's head is out, nothing else."""
    writer.write(EVENT_STREAM)
    await writer.drain()
    writer.transport.abort()


async def half_a_stream(_: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(EVENT_STREAM + chunk(b'data: {"n": 1}\n\n') + chunk(b'data: {"n": 2}\n\n') + chunk(b'data: {"half'))
    await writer.drain()
    await asyncio.sleep(0.05)  # so that what was written is not lost with the connection
    writer.transport.abort()


async def half_a_body(_: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n" + b"x" * 50)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


FAILURES: dict[str, Script] = {
    "hangs up": hang_up,
    "hangs up after the head": head_then_hang_up,
    "says nothing": hang,
    "speaks garbage": replying(random.Random(1).randbytes(3000) + b"\r\n\r\n"),
    "is unavailable": replying(answer(b'{"error": "dying"}', "503 Service Unavailable")),
    "is a bad gateway": replying(answer(b"<html>", "502 Bad Gateway")),
}


async def session_of(run: Running, engine: ScriptedEngine) -> str:
    """A session whose requests go to this engine first."""
    for n in range(200):
        async with run.http.post(run.admin_url + "/debug/route", json=CHAT, headers={"x-session-id": f"s{n}"}) as reply:
            if (await reply.json())["engine"] == engine.address:
                return f"s{n}"
    raise AssertionError("no session goes there")


@pytest.mark.parametrize("how", FAILURES)
async def test_before_the_first_byte_another_engine_answers(how: str) -> None:
    bad, good = ScriptedEngine(FAILURES[how]), ScriptedEngine()
    async with routed(bad, good, flags=IMPATIENT) as run:
        session = await session_of(run, bad)
        status, headers, body = await run.post(headers={"x-session-id": session})
        assert (status, body) == (200, b'{"ok": true}')
        assert headers["x-kvatlas-engine"] == good.address
        assert [s.body for s in bad.seen][:1] == [s.body for s in good.seen]
        await eventually(lambda: run.figure("in_flight") == 0, "nothing in flight")
        bad.seen.clear()
        await run.post(headers={"x-session-id": session})
        assert not bad.seen, "who has just failed is not asked again at once"


async def test_an_engine_that_is_gone_costs_nobody_a_request() -> None:
    bad, good = ScriptedEngine(), ScriptedEngine()
    async with routed(bad, good) as run:
        session = await session_of(run, bad)
        await bad.die()
        assert (await run.post(headers={"x-session-id": session}))[0] == 200
        await run.until(lambda f: any(v.health is Health.DOWN for v in f.engines.values()))
        retries = run.figure("retries_total", why="connect")
        assert (await run.post(headers={"x-session-id": session}))[0] == 200
        assert run.figure("retries_total", why="connect") == retries, "an engine that is down is not even tried"
        await bad.start()
        await run.until(lambda f: all(v.health is Health.READY for v in f.engines.values()))


async def test_a_connection_the_engine_had_closed_is_opened_again() -> None:
    """A pooled connection may have been closed at the other end: with one engine there is no other to try."""
    engine = ScriptedEngine()
    async with routed(engine) as run:
        assert (await run.post())[0] == 200
        turns = iter([hang_up, replying(answer(b"{}"))])

        async def once(seen: Seen, writer: asyncio.StreamWriter) -> None:
            await next(turns)(seen, writer)

        engine.script = once
        assert (await run.post())[0] == 200


@pytest.mark.parametrize(
    ("how", "status"), [("hangs up", 502), ("says nothing", 504), ("speaks garbage", 502), ("is unavailable", 503)]
)
async def test_without_another_engine_the_client_is_told(how: str, status: int) -> None:
    async with routed(ScriptedEngine(FAILURES[how]), flags=IMPATIENT) as run:
        code, _, body = await run.post()
        assert code == status
        assert b"error" in body


async def test_no_more_engines_are_tried_than_allowed() -> None:
    served = [ScriptedEngine(head_then_hang_up) for _ in range(4)]
    async with routed(*served, flags=(*NO_INDEXER, "--attempts", "2", "--policy", "least-load")) as run:
        assert (await run.post())[0] == 502
        assert sum(bool(e.seen) for e in served) == 2


async def test_a_stream_that_is_cut_ends_with_an_error_event_and_counts() -> None:
    async with routed(ScriptedEngine(half_a_stream), ScriptedEngine(half_a_stream)) as run:
        status, _, body = await run.post(body=STREAM)
        assert status == 200
        assert body.startswith(b'data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: {"half\n\n')
        assert sse(body[body.index(b"half") + 4 :])[0]["error"]["code"] == 502
        assert run.figure("cuts_total") == 1
        assert run.figure("requests_total", path="/v1/chat/completions", outcome="cut") == 1


async def test_a_stream_that_falls_silent_is_cut() -> None:
    async def silent(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b'data: {"n": 1}\n\n'))
        await asyncio.Event().wait()

    engine = ScriptedEngine(silent)
    async with routed(engine, flags=IMPATIENT) as run:
        _, _, body = await run.post(body=STREAM)
        assert "error" in sse(body)[-1]
        async with asyncio.timeout(DEADLINE_S):
            await engine.gone.wait()


async def test_a_body_that_is_cut_is_not_passed_off_as_whole() -> None:
    async with routed(ScriptedEngine(half_a_body)) as run:
        with pytest.raises(aiohttp.ClientPayloadError):
            await run.post()
        await eventually(lambda: run.figure("cuts_total") == 1, "counted")


async def test_a_stream_that_was_done_is_not_cut() -> None:
    async def done_and_gone(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: [DONE]\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with routed(ScriptedEngine(done_and_gone)) as run:
        assert (await run.post(body=STREAM))[2] == b"data: [DONE]\n\n"
        assert run.figure("cuts_total") == 0


async def test_a_request_in_flight_is_answered_before_the_router_goes() -> None:
    go_on = asyncio.Event()

    async def when_told(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        await go_on.wait()
        writer.write(chunk(b"data: 2\n\n") + b"0\r\n\r\n")
        await writer.drain()

    engine = ScriptedEngine(when_told)
    async with engine, running("--engine", engine.address, *NO_INDEXER, ready=1) as run:
        reply = await run.http.post(run.url + "/v1/chat/completions", json=STREAM)
        await reply.content.readany()
        stopping = asyncio.create_task(run.router.stop(drain_delay_s=0.3))
        await asyncio.sleep(0)
        assert (await run.get("/readyz"))[0] == 503
        assert (await run.get("/healthz"))[0] == 200
        await eventually(lambda: not _listens(run.router.public_port), "no new connections")
        assert not stopping.done()
        go_on.set()
        assert await reply.content.read() == b"data: 2\n\n"
        async with asyncio.timeout(DEADLINE_S):
            await stopping


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_drain_does_not_wait_for_ever() -> None:
    async def endless(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        await asyncio.Event().wait()

    engine = ScriptedEngine(endless)
    async with engine, running("--engine", engine.address, *NO_INDEXER, "--drain-s", "1", ready=1) as run:
        reply = await run.http.post(run.url + "/v1/chat/completions", json=STREAM)
        await reply.content.readany()
        async with asyncio.timeout(DEADLINE_S):
            await run.router.stop()
            rest = await reply.content.read()
        assert "error" in sse(rest)[-1]
        assert run.figure("cuts_total") == 1
