"""A simulated engine over real HTTP: shapes, streaming, errors, metrics, life and death."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvatlas_common.fleet import Adapter
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.loads.arrivals import Arrival, Segment
from kvatlas_loadtest.loads.figures import figures
from kvatlas_loadtest.loads.outcomes import Run
from kvatlas_loadtest.loads.real_time import Player, Target
from kvatlas_loadtest.loads.rendering import Rendering
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME, TimeModel
from tests.integration.engine_kit import simulated_engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "value " * 40}]
SLOW = TimeModel(step_s=0.02, prefill_token_s=0.0, decode_sequence_s=0.0, context_token_s=0.0)


@asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[tuple[SimulatedEngine, aiohttp.ClientSession]]:
    config = EngineConfig(**{"time_model": NO_TIME, "events_endpoint": None, **options})
    async with simulated_engine(config) as running, aiohttp.ClientSession(running.url) as session:
        yield running, session


async def post(session: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, Any]:
    async with session.post(path, json=body) as response:
        return response.status, await response.json()


async def stream(session: aiohttp.ClientSession, path: str, **body: Any) -> list[Any]:
    async with session.post(path, json={**body, "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        events = (await response.read()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_conversation_comes_back_from_the_cache() -> None:
    async with engine() as (_, session):
        status, first = await post(session, CHAT, model="tiny", messages=QUESTION, max_tokens=30)
        assert status == 200
        answer = first["choices"][0]
        assert (answer["finish_reason"], answer["message"]["role"], first["object"]) == (
            "length",
            "assistant",
            "chat.completion",
        )
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        follow_up = [*QUESTION, {"role": "assistant", "content": answer["message"]["content"]}, QUESTION[0]]
        _, second = await post(session, CHAT, model="tiny", messages=follow_up, max_tokens=1)
        computed = first["usage"]["total_tokens"] - 1  # all but the last sampled token
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == computed // 16 * 16


async def test_a_stream_says_what_the_whole_answer_says() -> None:
    async with engine() as (_, session):
        for path, prompt in ((CHAT, {"messages": QUESTION}), (COMPLETIONS, {"prompt": "value " * 40})):
            _, whole = await post(session, path, max_tokens=7, n=2, return_token_ids=True, **prompt)
            chunks = await stream(
                session,
                path,
                max_tokens=7,
                n=2,
                return_token_ids=True,
                stream_options={"include_usage": True},
                **prompt,
            )
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 14
            for choice in whole["choices"]:
                parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                if path == CHAT:
                    assert parts[0]["delta"] == {"role": "assistant", "content": ""}
                    assert "".join(p["delta"]["content"] for p in parts) == choice["message"]["content"]
                else:
                    assert "".join(p["text"] for p in parts) == choice["text"]
                assert [t for p in parts for t in p.get("token_ids") or []] == choice["token_ids"]
                assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]
            assert {chunk["object"] for chunk in chunks} == {
                "chat.completion.chunk" if path == CHAT else "text_completion"
            }


async def test_without_max_tokens_an_answer_ends_by_itself() -> None:
    async with engine(answer_tokens=5) as (_, session):
        _, answer = await post(session, CHAT, messages=QUESTION)
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 5)
        assert len(answer["choices"][0]["message"]["content"].split()) == 4  # the fifth token is the end


async def test_a_stop_string_ends_an_answer_and_frees_the_engine() -> None:
    async with engine() as (running, session):
        _, whole = await post(session, CHAT, messages=QUESTION, max_tokens=10)
        words = whole["choices"][0]["message"]["content"].split(" ")
        _, cut = await post(session, CHAT, messages=QUESTION, max_tokens=10, stop=words[4])
        choice = cut["choices"][0]
        assert choice["message"]["content"] == " ".join(words[:4]) + " "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", words[4])
        assert running.rank().load == 0


async def test_several_prompts_and_token_ids() -> None:
    async with engine() as (_, session):
        _, several = await post(
            session, COMPLETIONS, prompt=["a value", "the key"], max_tokens=2, return_token_ids=True
        )
        assert [c["index"] for c in several["choices"]] == [0, 1]
        ids = several["choices"][1]["prompt_token_ids"]
        _, same = await post(session, COMPLETIONS, prompt=ids, max_tokens=2)
        assert same["choices"][0]["text"] == several["choices"][1]["text"]


async def test_tokenize_agrees_with_what_is_computed() -> None:
    async with engine() as (_, session):
        _, tokenized = await post(session, "/tokenize", model="tiny", messages=QUESTION)
        _, answer = await post(session, CHAT, messages=QUESTION, max_tokens=1, return_token_ids=True)
        assert answer["prompt_token_ids"] == tokenized["tokens"]
        assert answer["usage"]["prompt_tokens"] == tokenized["count"]


async def test_models_and_adapters() -> None:
    async with engine(adapters=(Adapter("sales", "/srv/sales", 1),)) as (running, session):
        async with session.get("/v1/models") as response:
            cards = (await response.json())["data"]
        assert [(c["id"], c["root"], c["parent"]) for c in cards] == [
            ("tiny", str(running.config.model_path), None),
            ("sales", "/srv/sales", "tiny"),
        ]
        for model, cached in (("tiny", 0), ("sales", 0), ("sales", 48)):
            _, answer = await post(session, CHAT, model=model, messages=QUESTION, max_tokens=1)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (CHAT, {"model": "nope", "messages": QUESTION}, 404, "NotFoundError"),
        (CHAT, {"messages": "?"}, 400, "BadRequestError"),
        (CHAT, {"messages": QUESTION, "max_tokens": 99_999}, 400, "BadRequestError"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "BadRequestError"),
        (COMPLETIONS, {}, 400, "BadRequestError"),
    ],
)
async def test_errors_have_their_shape(path: str, body: dict[str, Any], status: int, kind: str) -> None:
    async with engine() as (_, session):
        got, answer = await post(session, path, **body)
        assert (got, answer["error"]["type"], answer["error"]["code"]) == (status, kind, status)


async def test_what_is_no_request_at_all() -> None:
    async with engine(api_key="secret") as (_, session):
        for method, path, headers, status in (
            ("GET", "/nothing", {}, 404),
            ("GET", "/v1/models", {}, 401),
            ("GET", "/v1/models", {"Authorization": "Bearer secret"}, 200),
            ("GET", CHAT, {"Authorization": "Bearer secret"}, 405),
            ("GET", "/health", {}, 200),
        ):
            async with session.request(method, path, headers=headers) as response:
                assert response.status == status
        async with session.post(CHAT, data=b"{", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 400


async def test_the_request_id_is_the_clients() -> None:
    async with (
        engine() as (_, session),
        session.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}, headers={"X-Request-Id": "abc"}) as response,
    ):
        assert response.headers["X-Request-Id"] == "abc"
        assert (await response.json())["id"] == "chatcmpl-abc"


async def test_metrics_show_the_load_and_a_client_that_leaves_takes_it_away() -> None:
    async with engine(time_model=SLOW, limits=EngineLimits(max_num_seqs=1)) as (running, session):
        body = {"messages": QUESTION, "max_tokens": 1000, "stream": True}
        async with session.post(CHAT, json=body) as first:
            await first.content.readany()
            waiting = asyncio.create_task(post(session, CHAT, messages=QUESTION))
            await until(lambda: running.rank().core.waiting == 1)
            async with session.get("/metrics") as response:
                page = await response.text()
            assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0' in page
            assert 'vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0' in page
            assert 'block_size="16"' in page
            assert "process_start_time_seconds" in page
            waiting.cancel()
            first.close()
        await until(lambda: running.rank().load == 0)
        assert running.rank().core.counters.finished == 0


async def test_ranks_are_caches_of_their_own() -> None:
    async with engine(data_parallel_size=2) as (running, session):
        for rank, status in (("0", 200), ("1", 200), ("2", 400), ("x", 400)):
            asked = {"messages": QUESTION, "max_tokens": 1}
            async with session.post(CHAT, json=asked, headers={"X-data-parallel-rank": rank}) as response:
                assert response.status == status
                if status == 200:
                    usage = (await response.json())["usage"]
                    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        assert running.block_table(0) == running.block_table(1) != {}
        async with session.post("/reset_prefix_cache") as response:
            assert await response.json() == {"success": True}
        assert running.block_table(0) == running.block_table(1) == {}


async def test_a_crash_cuts_streams_and_a_restart_is_a_new_engine_at_the_same_address() -> None:
    async with engine(time_model=SLOW) as (running, session):
        before = running.url
        body = {"messages": QUESTION, "max_tokens": 1000, "stream": True}
        async with session.post(CHAT, json=body) as response:
            await response.content.readany()
            await running.crash()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        with pytest.raises(aiohttp.ClientError):
            await post(session, CHAT, messages=QUESTION)
        await running.restart()
        assert (running.url, running.block_table()) == (before, {})
        status, _ = await post(session, CHAT, messages=QUESTION, max_tokens=1)
        assert status == 200


async def test_a_body_of_some_megabytes_is_read() -> None:
    async with engine() as (_, session):
        body = io.BytesIO(json.dumps({"prompt": "value " * 500_000}).encode())
        async with session.post(COMPLETIONS, data=body) as response:
            answer = await response.json()
        assert answer["error"]["param"] == "input_tokens"  # too long for the model, not for HTTP


async def test_a_load_over_two_engines_of_one_process() -> None:
    config = EngineConfig(time_model=NO_TIME, events_endpoint=None)
    arrivals = [
        Arrival(0.0, (Segment(n % 2, 100), Segment(9 + n, 10)), 3, after=n - 1 if n else None) for n in range(8)
    ]
    async with (
        simulated_engine(config) as one,
        simulated_engine(config) as two,
    ):
        for target in (one, two):
            player = Player(Target(target.url, Rendering("tiny")), arrivals)
            await player.play()
            found = figures(Run("", "", 0, tuple(player.outcomes), (), 0))
            assert (found.requests, found.errors) == (8, {})
            assert found.cached_share > 0.5  # six of eight found their context
            assert found.output_tokens_per_s > 0
        assert one.block_table() == two.block_table()


async def test_the_command_serves_until_told_to_stop() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvatlas_loadtest", "engine", "--speed", "0", "--kv-events-endpoint", "", stdout=-1
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            addresses = json.loads(await process.stdout.readline())
            assert addresses["events_endpoint"] is None
            async with aiohttp.ClientSession(addresses["url"]) as session:
                status, _ = await post(session, CHAT, messages=QUESTION, max_tokens=1)
            assert status == 200
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvatlas_loadtest", "engine", "--model", str(tmp_path), stdout=-1, stderr=-1
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert "tokenizer.json" in said.decode()
