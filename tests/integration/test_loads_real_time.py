"""A load played to real servers: simulated engines, and small ones that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from kvatlas_loadtest.engine import EngineConfig
from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Segment
from kvatlas_loadtest.loads.figures import figures, queues
from kvatlas_loadtest.loads.outcomes import Run
from kvatlas_loadtest.loads.real_time import NOT_SENT, Player, Target
from kvatlas_loadtest.loads.rendering import Rendering
from kvatlas_loadtest.time_model import NO_TIME, TimeModel
from tests.integration.engine_kit import simulated_engine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TINY = Rendering("tiny")


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def streamed(*texts: str, done: bool = True, headers: Mapping[str, str] | None = None) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for text in texts:
            chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return answer


def one(at_s: float = 0.0, *more: Segment | Answer, after: int | None = None, think_s: float = 0.0) -> Arrival:
    return Arrival(at_s, more or (Segment(int(at_s * 1000), 20),), 4, after=after, think_s=think_s)


async def test_open_loop_turns_and_what_a_real_engine_says_of_them() -> None:
    speed = TimeModel(step_s=0.02, prefill_token_s=0.0, decode_sequence_s=0.0, context_token_s=0.0)
    async with simulated_engine(EngineConfig(time_model=speed, events_endpoint=None)) as engine:
        arrivals = [
            one(0.0, Segment(1, 300)),
            one(0.05, Segment(1, 300)),
            one(0.0, Segment(1, 300), Answer(0), Segment(2, 20), after=0, think_s=0.1),
            one(0.1, Segment(3, 40)),
        ]
        player = Player(Target(engine.url, TINY), arrivals)
        await player.play()
    outcomes = sorted(player.outcomes, key=lambda o: o.arrival)
    assert [o.error for o in outcomes] == [""] * 4
    assert [o.sent_s for o in outcomes if o.arrival != 2] == pytest.approx([0.0, 0.05, 0.1], abs=0.001)
    first, second, turn, _ = outcomes
    assert first.finished_s is not None
    assert turn.sent_s == pytest.approx(first.finished_s + 0.1, abs=0.02)
    assert turn.cached_tokens >= first.prompt_tokens - 16  # the turn before, all but a block
    assert second.cached_tokens > 250
    assert all(o.output_tokens == 4 and o.ttft_s is not None and o.ttft_s > 0.02 for o in outcomes)
    assert len(player.gaps_s) > 8
    found = figures(Run("", "", 0, tuple(outcomes), queues(outcomes, 0.01), 0), gaps_s=player.gaps_s)
    assert found.queue_mean > 0
    assert found.itl is not None
    assert 0.01 < found.itl.mean < 0.2


async def test_a_turn_carries_what_was_really_answered() -> None:
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append((request.headers.get("x-session-id"), await request.json()))
        return await streamed("so ", "it is", headers={"x-kvatlas-engine": "e:1", "x-kvatlas-reason": "precise"})(
            request
        )

    async with server(answer) as url:
        turn = Arrival(0.0, (Segment(1, 3), Answer(0), Segment(2, 2)), 4, session="s", after=0)
        player = Player(Target(url, Rendering("m")), [one(0.0, Segment(1, 3)), turn])
        await player.play()
    session, body = seen[1]
    assert session == "s"
    assert body["stream_options"] == {"include_usage": True}
    assert body["messages"][1] == {"role": "assistant", "content": "so it is"}
    outcome = player.outcomes[1]
    assert (outcome.engine, outcome.reason, outcome.output_tokens) == ("e:1", "precise", 2)  # no usage: pieces


async def test_stages_begin_when_the_one_before_has_ended() -> None:
    async with simulated_engine(EngineConfig(time_model=TimeModel(step_s=0.02), events_endpoint=None)) as engine:
        arrivals = [one(0.0), one(0.01), Arrival(0.05, (Segment(9, 9),), 4, stage=1)]
        player = Player(Target(engine.url, TINY), arrivals)
        await player.play()
    before, last = player.outcomes[:2], player.outcomes[2]
    assert last.arrival == 2
    assert last.sent_s >= max(o.finished_s or 0.0 for o in before) + 0.05


async def test_who_sheds_who_cuts_and_whose_conversation_ends() -> None:
    async def shed(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTooManyRequests

    turns = [one(), one(0.0, Segment(1, 2), Answer(0), after=0), one(0.0, Segment(1, 2), Answer(1), after=1)]
    async with server(shed) as url:
        player = Player(Target(url, TINY), turns)
        await player.play()
    found = figures(Run("", "", 0, tuple(player.outcomes), (), 0))
    assert (found.shed, found.errors, found.ttft) == (1, {NOT_SENT: 2}, None)
    async with server(streamed("half", done=False)) as url:
        player = Player(Target(url, TINY), [one()])
        await player.play()
    assert [o.error for o in player.outcomes] == ["cut"]
    player = Player(Target(url, TINY), [one()])  # nobody listens there any more
    await player.play()
    assert [o.error for o in player.outcomes] == ["ClientConnectorError"]


async def test_those_beyond_the_connections_wait_and_their_time_counts() -> None:
    open_now, open_most = 0, 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal open_now, open_most
        open_now += 1
        open_most = max(open_most, open_now)
        await asyncio.sleep(0.05)
        open_now -= 1
        return await streamed("x")(request)

    async with server(slow) as url:
        player = Player(Target(url, TINY, connections_max=2), [one() for _ in range(6)])
        await player.play()
    assert open_most == 2
    assert player.late_max_s >= 0.1
    assert max(o.ttft_s or 0.0 for o in player.outcomes) >= 0.15


async def test_a_load_that_is_broken_off_keeps_what_it_has() -> None:
    async with simulated_engine(EngineConfig(time_model=NO_TIME, events_endpoint=None)) as engine:
        answered = asyncio.Event()
        player = Player(Target(engine.url, TINY), [one(), one(600.0)], lambda outcome: answered.set())
        playing = asyncio.create_task(player.play())
        async with asyncio.timeout(30):
            await answered.wait()
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
    assert [o.error for o in player.outcomes] == [""]
