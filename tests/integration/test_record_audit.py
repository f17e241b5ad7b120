"""`kvatlas record` of a simulated engine, as a process of its own, and then the audit of what it recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvatlas_cli import audit, capture
from kvatlas_cli.record_answers import Answer
from kvatlas_cli.record_engine import RecordedEngine, RecordFailed
from kvatlas_cli.record_events import EventLog, Patience
from kvatlas_cli.record_files import CaptureWriter
from kvatlas_cli.record_proxy import RecordingProxy
from kvatlas_cli.record_session import Clocks, Recorder
from kvatlas_common.engines.asking import open_session
from kvatlas_common.engines.specs import parse_engine
from kvatlas_common.fleet import Adapter
from kvatlas_indexer.adapters.zmq_sockets import new_context
from kvatlas_indexer.adapters.zmq_source import ZmqSource
from kvatlas_indexer.core.naming import Expected
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.texts import WORDS
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.engine_kit import simulated_engine
from tests.integration.forked import Forked
from tests.integration.processes import DEADLINE_S, until

ADAPTERS = (Adapter("ada", "/srv/adapters/ada", 1), Adapter("bob", "/srv/adapters/bob", 2))


@dataclass(frozen=True, slots=True)
class Recorded:
    status: int
    summary: dict[str, Any]
    screen: str


class Recording:
    """`kvatlas record`, under way. What it writes is put beside the folder it records into."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self._out, self._screen = folder.with_suffix(".out"), folder.with_suffix(".screen")
        for path in (self._out, self._screen):
            path.touch()
        command = ["kvatlas_cli", "record", str(folder), "--json", *words]
        self.process = Forked(command, self._out, os.environ, errors=self._screen)

    async def finished(self) -> Recorded:
        await until(lambda: self.process.poll() is not None, "the recorder to end")
        return Recorded(self.process.wait(), json.loads(self._out.read_text() or "{}"), self._screen.read_text())

    async def url(self) -> str:
        """The address that it says it listens at."""

        def look() -> bool:
            assert self.process.poll() is None, f"the recorder ended: {self._screen.read_text()}"
            return "http://" in self._screen.read_text().rpartition("\n")[0]

        await until(look, "the recorder to listen")
        return "http://" + self._screen.read_text().split("http://")[1].split()[0]


@contextlib.asynccontextmanager
async def recording(folder: Path, *words: str) -> AsyncIterator[Recording]:
    started = Recording(folder, words)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


async def recorded(folder: Path, *words: str) -> Recorded:
    async with recording(folder, *words) as started:
        return await started.finished()


def config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"time_model": NO_TIME, "limits": EngineLimits(num_blocks=200, block_size=16), **options})


def where(engine: SimulatedEngine) -> list[str]:
    return ["--engine", engine.url, "--events", engine.events_endpoint or ""]


async def ask(engine: SimulatedEngine, prompt: str) -> None:
    body = {"model": engine.config.model, "prompt": prompt, "max_tokens": 1}
    async with aiohttp.ClientSession() as client, client.post(f"{engine.url}/v1/completions", json=body) as answer:
        assert answer.status == 200


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def audited(folder: Path) -> audit.Report:
    return audit.audit(capture.load(folder), Expected(None, None, None))


async def test_a_generated_workload_with_adapters_salts_and_evictions_is_exact(tmp_path: Path) -> None:
    async with simulated_engine(config(adapters=ADAPTERS)) as engine:
        replay = ["--replay", engine.replay_endpoint or ""]  # whoever subscribes may miss the first message
        made = await recorded(tmp_path / "c", *where(engine), *replay, "--generate", "40")
    assert made.status == 0, made.screen
    assert made.summary["comparable"] == made.summary["requests"] == 40
    assert (made.summary["lost"], made.summary["unsettled"], made.summary["warnings"]) == (0, 0, [])
    assert "kvatlas audit" in made.screen
    report = audited(tmp_path / "c")
    assert (report.requests, report.mismatches, report.inexact, report.findings) == (40, 0, "", [])
    assert report.predicted_tokens == report.actual_tokens == made.summary["cached_tokens"] > 1000
    bodies = [request.model for request in capture.load(tmp_path / "c").requests]
    assert set(bodies) == {"tiny", "ada", "bob"}


async def test_an_engine_of_two_ranks_that_connects(tmp_path: Path) -> None:
    port = _two_free_ports()
    async with simulated_engine(config(events_endpoint=f"tcp://127.0.0.1:{port}", data_parallel_size=2)) as engine:
        listen = ["--engine", f"{engine.url},ranks=2", "--zmq-listen", f"tcp://127.0.0.1:{port}"]
        made = await recorded(tmp_path / "c", *listen, "--generate", "16")
    assert made.status == 0, made.screen
    assert made.summary["comparable"] == 16
    assert {request.rank for request in capture.load(tmp_path / "c").requests} == {0, 1}
    report = audited(tmp_path / "c")
    assert report.mismatches == 0
    assert report.predicted_tokens == report.actual_tokens > 0


@pytest.mark.parametrize("how", ["replay", "reset", "neither"])
async def test_an_engine_that_served_before(tmp_path: Path, how: str) -> None:
    before = words(1, 200)
    (tmp_path / "requests.jsonl").write_text(json.dumps({"body": {"model": "tiny", "prompt": before, "max_tokens": 1}}))
    async with simulated_engine(config()) as engine:
        await ask(engine, before)
        more = {"replay": ["--replay", engine.replay_endpoint or ""], "reset": ["--reset"], "neither": []}[how]
        made = await recorded(tmp_path / "c", *where(engine), "--requests", str(tmp_path / "requests.jsonl"), *more)
    assert made.status == 0, made.screen
    report = audited(tmp_path / "c")
    assert (report.actual_tokens > 0) is (how != "reset")
    if how == "neither":
        assert "not wholly known" in made.screen
        assert "joined" in report.inexact
        assert report.mismatches == 1  # what the engine held before can only be missing
    else:
        assert "not wholly known" not in made.screen
        assert (report.mismatches, report.inexact) == (0, "")


async def test_live_traffic_is_recorded_until_interrupted(tmp_path: Path) -> None:
    """Many at once: each is recorded by itself, and comparable if its answer tells the usage."""
    shared = words(2, 150)

    def body(number: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": shared}, {"role": "user", "content": words(number, 30)}]
        streamed = {"stream": True} | ({"stream_options": {"include_usage": True}} if number % 4 else {})
        return {"model": "tiny", "messages": messages, "max_tokens": 8, **(streamed if number % 2 == 0 else {})}

    async with (
        simulated_engine(config()) as engine,
        aiohttp.ClientSession() as client,
        recording(tmp_path / "c", *where(engine), "--listen", "127.0.0.1:0") as started,
    ):
        url = await started.url()

        async def post(number: int) -> bytes:
            async with client.post(f"{url}/v1/chat/completions", json=body(number)) as answer:
                assert answer.status == 200
                return await answer.read()

        answers = await asyncio.gather(*(post(number) for number in range(16)))
        assert all(b"[DONE]" in answer for answer in answers[::2])
        async with client.get(f"{url}/v1/models") as models:
            assert (await models.json())["data"][0]["id"] == "tiny"
        async with client.post(f"{url}/v1/chat/completions", json={"model": "nope", "messages": []}) as refused:
            assert refused.status == 404
        started.process.send_signal(signal.SIGINT)
        made = await started.finished()
    assert made.status == 0, made.screen
    assert (made.summary["requests"], made.summary["comparable"], made.summary["failed"]) == (16, 12, {"404": 1})
    assert sum(made.summary["not_comparable"].values()) == 4
    report = audited(tmp_path / "c")
    assert (report.requests, report.mismatches) == (12, 0)
    assert report.actual_tokens >= 11 * 144


# -- parts of it, in this process --------------------------------------------------------------------------------------

QUICK = Patience(quiet_s=0.02, unsure_s=0.05)


@dataclass(frozen=True, slots=True)
class Bench:
    recorder: Recorder
    session: aiohttp.ClientSession
    folder: Path
    warnings: list[str]


@contextlib.asynccontextmanager
async def bench(tmp_path: Path, engine_url: str, events: str, patience: Patience = QUICK) -> AsyncIterator[Bench]:
    spec, warnings, context = parse_engine(f"{engine_url},events={events}"), list[str](), new_context()
    with CaptureWriter(tmp_path / "c") as files:
        log = EventLog(files.message, time.time)
        source = ZmqSource(context, list, log.on_message)
        source.set_dialled({spec.id: events})
        try:
            async with open_session() as session:
                engine = RecordedEngine(session, spec, 10.0)
                clocks = Clocks(time.time, random.Random())
                yield Bench(
                    Recorder(engine, log, files, clocks=clocks, warn=warnings.append, patience=patience),
                    session,
                    tmp_path / "c",
                    warnings,
                )
        finally:
            source.close()
            context.term()


@contextlib.asynccontextmanager
async def served(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def test_an_engine_that_publishes_nothing_is_named_with_the_cure(tmp_path: Path) -> None:
    async with simulated_engine(config(events_endpoint=None)) as engine:
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            events = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
            async with bench(tmp_path, engine.url, events, replace(QUICK, first_s=0.1)) as it:
                with pytest.raises(RecordFailed, match="--kv-events-config") as failed:
                    await it.recorder.begin(None, reset=False)
    assert events in str(failed.value)


async def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with bench(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}", "tcp://127.0.0.1:9") as it:
            with pytest.raises(RecordFailed, match="nobody listens"):
                await it.recorder.begin(None, reset=False)


async def test_an_engine_that_hides_its_cached_tokens_is_warned_of(tmp_path: Path) -> None:
    """As vLLM without --enable-prompt-tokens-details."""
    async with simulated_engine(config()) as engine, aiohttp.ClientSession() as client:

        async def without_details(request: web.Request) -> web.StreamResponse:
            async with client.request(request.method, engine.url + request.path, data=await request.read()) as answer:
                if not request.path.startswith("/v1/c"):
                    return web.Response(body=await answer.read(), status=answer.status)
                fields = await answer.json()
                fields["usage"]["prompt_tokens_details"] = None
                return web.json_response(fields)

        async with (
            served(without_details) as url,
            bench(tmp_path, url, engine.events_endpoint or "") as it,
        ):
            traits = await it.recorder.begin(None, reset=False)
            assert (traits.models, traits.block_size) == (["tiny"], 16)
            proxy = RecordingProxy(it.session, url, it.recorder, lambda: None, 10.0)
            runner, through = await proxy.serve("127.0.0.1", 0)
            try:
                body = {"model": "tiny", "prompt": words(1, 40), "max_tokens": 1}
                async with client.post(f"{through}/v1/completions", json=body) as answer:
                    assert answer.status == 200
            finally:
                await runner.cleanup()
    assert "--enable-prompt-tokens-details" in it.warnings[0]  # one about a late subscription may follow
    (request,) = capture.load(it.folder).requests
    assert request.concurrent
    assert len(request.prompt_token_ids) >= 40


async def test_bytes_pass_unchanged_both_ways(tmp_path: Path) -> None:
    """A body whose JSON no library would write so, and a stream in pieces that are no events."""
    sent = b'{ "model":"tiny","messages" :[ ],\n "stream":true, "x":1e2}\r\n'
    pieces = [b'data: {"cho', b'ices": []}\n', b"\ndata:", bytes(range(256)), b" [DONE]\n\n"]
    seen: list[tuple[str, bytes, str | None]] = []
    gone_on = asyncio.Event()

    async def engine(request: web.Request) -> web.StreamResponse:
        seen.append((request.path_qs, await request.read(), request.headers.get("x-tenant")))
        response = web.StreamResponse(status=206, headers={"content-type": "text/event-stream", "x-engine": "yes"})
        await response.prepare(request)
        for number, piece in enumerate(pieces):
            await response.write(piece)
            if number == 0:
                await gone_on.wait()  # until the client has had the first piece
        return response

    async with served(engine) as url, bench(tmp_path, url, "tcp://127.0.0.1:9") as it:
        proxy = RecordingProxy(it.session, url, it.recorder, lambda: None, 10.0)
        runner, through = await proxy.serve("127.0.0.1", 0)
        try:
            async with (
                aiohttp.ClientSession() as client,
                client.post(f"{through}/v1/embeddings?a=b%20c", data=sent, headers={"x-tenant": "t"}) as answer,
            ):
                assert (answer.status, answer.headers["x-engine"]) == (206, "yes")
                got = await answer.content.readexactly(len(pieces[0]))
                gone_on.set()
                got += await answer.content.read()
        finally:
            await runner.cleanup()
    assert got == b"".join(pieces)
    assert seen == [("/v1/embeddings?a=b%20c", sent, "t")]


async def test_a_client_that_goes_away_does_not_end_its_request(tmp_path: Path) -> None:
    may_answer, alone = asyncio.Event(), asyncio.Event()

    async def engine(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        await may_answer.wait()
        await response.write(b"x" * (1 << 20))
        await response.write(b"ended")
        await response.write_eof()
        alone.set()
        return response

    async with served(engine) as url, bench(tmp_path, url, "tcp://127.0.0.1:9") as it:
        proxy = RecordingProxy(it.session, url, it.recorder, lambda: None, 10.0)
        runner, through = await proxy.serve("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as client:
                answer = await client.post(f"{through}/v1/embeddings", data=b"{}")
                assert await answer.content.readexactly(5) == b"begun"
                answer.close()
            may_answer.set()
            async with asyncio.timeout(DEADLINE_S):
                await alone.wait()

            async def at_once() -> Answer:
                return Answer()

            async with asyncio.timeout(DEADLINE_S):
                await it.recorder.alone(at_once)  # its turn has come: the other request was read to its end
        finally:
            await runner.cleanup()


def _two_free_ports() -> int:
    """The lower of two ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port
