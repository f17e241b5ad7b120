"""A fleet that is full, and engines that fail and recover: over sockets, with engines that do what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.integration.processes import DEADLINE_S
from tests.integration.router_kit import (
    CHAT,
    EVENT_STREAM,
    NO_INDEXER,
    Running,
    ScriptedEngine,
    Seen,
    answer,
    chunk,
    eventually,
    hang_up,
    replying,
    routed,
    running,
)

Reply = tuple[int, Mapping[str, str], bytes]
ONE_AT_A_TIME = (*NO_INDEXER, "--engine-in-flight-max", "1")


@dataclass
class Busy:
    """Answers one request for each `go`, with the number it came with."""

    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    order: list[int] = field(default_factory=list)

    async def __call__(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        number = json.loads(seen.body).get("seed", -1)
        self.order.append(number)
        await self.go.acquire()
        writer.write(answer(json.dumps({"seed": number}).encode()))
        await writer.drain()


async def ask(run: Running, number: int) -> Reply:
    return await run.post(body=CHAT | {"seed": number})


async def asked(run: Running, *numbers: int) -> list[asyncio.Task[Reply]]:
    """Requests in this order, each sent on or in the queue before the next is sent."""
    tasks = []
    for number in numbers:
        before = run.figure("in_flight")
        tasks.append(asyncio.create_task(ask(run, number)))
        await eventually(lambda before=before: run.figure("in_flight") == before + 1, "taken")  # type: ignore[misc]
    return tasks


async def test_requests_wait_for_a_full_fleet_and_are_served_in_order() -> None:
    busy = Busy()
    async with routed(ScriptedEngine(busy), flags=ONE_AT_A_TIME) as run:
        tasks = await asked(run, *range(5))
        await eventually(lambda: run.figure("queue_requests") == 4, "four wait")
        await eventually(lambda: busy.order == [0], "one is sent on")
        assert (await run.get("/readyz"))[0] == 200
        for _ in tasks:
            busy.go.release()
        async with asyncio.timeout(DEADLINE_S):
            replies = await asyncio.gather(*tasks)
        assert [json.loads(body)["seed"] for _, _, body in replies] == [0, 1, 2, 3, 4]
        assert busy.order == [0, 1, 2, 3, 4]
        assert run.figure("queue_requests") == 0
        assert run.figure("queue_wait_seconds_count") == 4


async def test_a_place_at_any_engine_will_do() -> None:
    first, second = Busy(), Busy()
    flags = (*ONE_AT_A_TIME, "--policy", "least-load")
    async with routed(ScriptedEngine(first), ScriptedEngine(second), flags=flags) as run:
        tasks = await asked(run, 0, 1, 2)
        await eventually(lambda: len(first.order) == len(second.order) == 1, "one each")
        (free, full) = (first, second)
        free.go.release()
        await eventually(lambda: free.order[1:] == [2], "the third goes where a place came free")
        assert full.order[1:] == []
        free.go.release()
        full.go.release()
        await asyncio.gather(*tasks)


async def test_who_waits_too_long_is_told_when_to_come_again() -> None:
    busy = Busy()
    async with routed(ScriptedEngine(busy), flags=(*ONE_AT_A_TIME, "--queue-deadline-s", "0.2")) as run:
        (first,) = await asked(run, 0)
        status, headers, body = await ask(run, 1)
        assert status == 429
        assert int(headers["Retry-After"]) >= 1
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_exceeded", 429)
        assert "--queue-deadline-s" in error["message"]
        assert run.figure("shed_total", cause="deadline") == 1
        busy.go.release()
        assert (await first)[0] == 200
        assert busy.order == [0]


async def test_a_full_queue_is_told_at_once() -> None:
    busy = Busy()
    async with routed(ScriptedEngine(busy), flags=(*ONE_AT_A_TIME, "--queue-max", "1")) as run:
        tasks = await asked(run, 0, 1)
        status, headers, body = await ask(run, 2)
        assert (status, b"--queue-max" in body) == (429, True)
        assert headers["Retry-After"] == "60", "nothing has moved yet: the deadline is all that is known"
        assert run.figure("shed_total", cause="full") == 1
        busy.go.release()
        busy.go.release()
        assert [(await t)[0] for t in tasks] == [200, 200]


async def test_a_client_that_leaves_leaves_the_queue() -> None:
    busy = Busy()
    async with routed(ScriptedEngine(busy), flags=ONE_AT_A_TIME) as run:
        first, gone, last = await asked(run, 0, 1, 2)
        await eventually(lambda: run.figure("queue_requests") == 2, "two wait")
        gone.cancel()
        await eventually(lambda: run.figure("queue_requests") == 1, "one left")
        busy.go.release()
        busy.go.release()
        assert [(await t)[0] for t in (first, last)] == [200, 200]
        assert busy.order == [0, 2]


async def test_what_the_engine_says_waits_saturates_it_until_it_says_otherwise() -> None:
    page = b"vllm:num_requests_running 9\nvllm:num_requests_waiting %d\nvllm:kv_cache_usage_perc 0.5\n"
    engine = ScriptedEngine(figures=page % 40)
    async with routed(engine) as run:
        await eventually(lambda: [v.waiting for v in run.router.index.loads().values()] == [40], "scraped")
        asking = asyncio.create_task(run.post())
        await eventually(lambda: run.figure("queue_requests") == 1, "it waits")
        assert not engine.seen
        engine.figures = page % 3
        async with asyncio.timeout(DEADLINE_S):
            assert (await asking)[0] == 200


async def test_an_engine_that_keeps_failing_is_ejected_and_comes_back() -> None:
    bad, good = ScriptedEngine(replying(answer(b"{}", "500 Internal"))), ScriptedEngine()
    flags = (*NO_INDEXER, "--policy", "round-robin", "--ejection-s", "0.3", "--slow-start-s", "0")
    async with routed(bad, good, flags=flags) as run:
        codes = [(await run.post())[0] for _ in range(40)]
        assert run.figure("ejections_total", cause="consecutive") == 1
        assert run.figure("ejected_engines") == 1
        assert 5 <= codes.count(500) < 20, "the five that ejected it, and trials since"
        assert codes[-1] == 200
        bad.script = good.script
        bad.seen.clear()

        async def back() -> bool:
            await run.post()
            return run.figure("ejected_engines") == 0

        async with asyncio.timeout(DEADLINE_S):
            while not await back():
                await asyncio.sleep(0.02)
        assert bad.seen
        assert [(await run.post())[0] for _ in range(10)] == [200] * 10


async def test_the_only_engine_is_never_out() -> None:
    engine = ScriptedEngine(hang_up)
    async with routed(engine) as run:
        for _ in range(8):
            assert (await run.post())[0] == 502
        assert run.figure("ejected_engines") == 1
        engine.script = replying(answer(b"{}"))
        assert (await run.post())[0] == 200
        assert run.figure("ejected_engines") == 0


async def test_a_request_tried_again_elsewhere_does_not_wait_again() -> None:
    busy = Busy()
    full, bad = ScriptedEngine(busy), ScriptedEngine(hang_up)
    async with routed(full, bad, flags=ONE_AT_A_TIME) as run:
        tasks = [asyncio.create_task(ask(run, n)) for n in range(2)]
        await eventually(lambda: len(busy.order) == 2, "both are at the engine that works, though it takes one")
        busy.go.release()
        busy.go.release()
        assert [(await t)[0] for t in tasks] == [200, 200]


async def test_a_drain_serves_the_queue() -> None:
    busy = Busy()
    engine = ScriptedEngine(busy)
    async with engine, running("--engine", engine.address, *ONE_AT_A_TIME, ready=1) as run:
        tasks = await asked(run, 0, 1, 2)
        stopping = asyncio.create_task(run.router.stop())
        for _ in tasks:
            busy.go.release()
        async with asyncio.timeout(DEADLINE_S):
            assert [(await t)[0] for t in tasks] == [200, 200, 200]
            await stopping


async def test_whom_a_drain_cannot_serve_it_sends_elsewhere() -> None:
    async def endless(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        await asyncio.Event().wait()

    engine = ScriptedEngine(endless)
    flags = (*ONE_AT_A_TIME, "--drain-s", "1")
    async with engine, running("--engine", engine.address, *flags, ready=1) as run:
        reply = await run.http.post(run.url + "/v1/chat/completions", json=CHAT)
        await reply.content.readany()
        (waiting,) = await asked(run, 1)
        async with asyncio.timeout(DEADLINE_S):
            stopping = asyncio.create_task(run.router.stop())
            status, headers, body = await waiting
            assert (status, headers["Retry-After"]) == (503, "1")
            assert b"shutting down" in body
            await reply.content.read()
            await stopping
        assert run.figure("shed_total", cause="draining") == 1
