"""What passes through the router passes unchanged, and what does not pass is answered as the contract says."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
from collections.abc import Awaitable, Callable

import pytest

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
    replying,
    routed,
    running,
)


def streaming(
    pieces: list[bytes], pause: Callable[[], Awaitable[None]] | None = None
) -> Callable[..., Awaitable[None]]:
    async def script(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM)
        for piece in pieces:
            writer.write(chunk(piece))
            await writer.drain()
            if pause is not None:
                await pause()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return script


async def test_a_request_arrives_as_it_was_sent() -> None:
    body = b' {"model":"tiny",\n "temperature": 0.10, "prompt":"\\u00e9\xc3\xa9", "unknown": [1e400]}  '
    engine = ScriptedEngine()
    async with routed(engine) as run:
        headers = {
            "X-Odd": "a, b", "Authorization": "Bearer client", "Accept-Encoding": "br", "X-Request-Id": "mine-7",
            "Connection": "keep-alive, X-Drop", "X-Drop": "1", "Content-Type": "application/json; charset=utf-8",
        }  # fmt: skip
        status, said, _ = await run.post("/v1/completions?a=%2F&b", body, headers)
        (seen,) = engine.seen
        assert (status, seen.method, seen.target, seen.body) == (200, "POST", "/v1/completions?a=%2F&b", body)
        assert said["x-request-id"] == seen.header("x-request-id") == "mine-7"
        sent = {"x-odd": "a, b", "authorization": "Bearer client", "accept-encoding": "br", "host": engine.address}
        assert {k: seen.header(k) for k in sent} == sent
        assert seen.header("content-type") == "application/json; charset=utf-8"
        assert seen.header("x-drop") is None
        assert len(seen.headers) == len({k for k, _ in seen.headers}), "no header twice"


@pytest.mark.parametrize("seed", range(6))
async def test_a_stream_arrives_byte_by_byte_as_it_was_sent(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.randbytes(rng.choice([1, 2, 7, 100, 5_000, 70_000])) for _ in range(rng.randint(1, 40))]
    engine = ScriptedEngine(streaming(pieces))
    async with routed(engine) as run:
        status, headers, body = await run.post()
        assert (status, body) == (200, b"".join(pieces))
        assert headers["x-kvatlas-engine"] == engine.address
        assert headers["x-kvatlas-reason"] == "affinity:index-unavailable"
        assert "x-kvatlas-cached-tokens" not in headers, "nothing is known, so nothing is predicted"


async def test_a_compressed_answer_stays_compressed() -> None:
    packed = gzip.compress(json.dumps({"text": "x" * 50_000}).encode())
    reply = answer(packed, "200 OK", "Content-Type: application/json", "Content-Encoding: gzip", "X-Engine: A, B")
    engine = ScriptedEngine(replying(reply))
    async with routed(engine) as run:
        _, headers, body = await run.post()
        assert body == packed
        assert (headers["Content-Encoding"], headers["X-Engine"]) == ("gzip", "A, B")
        assert headers["Content-Length"] == str(len(packed))


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "422 Odd", "429 Too Many", "500 Internal"])
async def test_an_engines_error_passes_as_it_is_and_is_not_tried_again(status: str) -> None:
    reply = replying(answer(b'{"error": "whatever"}', status, "X-Why: because"))
    one = ScriptedEngine(reply)
    two = ScriptedEngine(reply)
    async with routed(one, two) as run:
        code, headers, body = await run.post()
        assert (str(code), body, headers["X-Why"]) == (status[:3], b'{"error": "whatever"}', "because")
        assert len(one.seen) + len(two.seen) == 1


async def test_a_chunk_is_passed_on_before_the_next_one_comes() -> None:
    next_one = asyncio.Semaphore(0)

    async def pause() -> None:
        await next_one.acquire()

    pieces = [b"data: %d\n\n" % n for n in range(5)]
    engine = ScriptedEngine(streaming(pieces, pause))
    async with routed(engine) as run:
        reply = await run.http.post(run.url + "/v1/chat/completions", json=CHAT | {"stream": True})
        for piece in pieces:
            async with asyncio.timeout(DEADLINE_S):
                assert await reply.content.readany() == piece
            next_one.release()
        assert await reply.content.read() == b""


async def test_an_engine_waits_for_a_client_that_does_not_read() -> None:
    piece, total, written = random.Random(1).randbytes(1 << 20), 64, 0

    async def much(_: Seen, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(EVENT_STREAM)
        while written < total:
            writer.write(chunk(piece))
            await writer.drain()
            written += 1
        writer.write(b"0\r\n\r\n")

    async with routed(ScriptedEngine(much)) as run:
        reader, writer = await asyncio.open_connection("127.0.0.1", run.router.public_port, limit=1 << 16)
        body = json.dumps(CHAT).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        async with asyncio.timeout(DEADLINE_S):
            await reader.readuntil(b"\r\n\r\n")
            seen = -1
            while seen != written:  # until it stands still
                seen = written
                await asyncio.sleep(0.2)
            assert written < total / 2
            came = hashlib.sha256()
            while size := int(await reader.readline(), 16):
                came.update(await reader.readexactly(size))
                await reader.readline()
        assert came.digest() == hashlib.sha256(piece * total).digest()
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_leaves_cancels_its_request() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    engine = ScriptedEngine(streaming([b"data: 1\n\n"], never))
    async with routed(engine) as run:
        reply = await run.http.post(run.url + "/v1/chat/completions", json=CHAT)
        await reply.content.readany()
        reply.close()
        async with asyncio.timeout(DEADLINE_S):
            await engine.gone.wait()


async def test_a_client_that_leaves_before_the_first_byte_cancels_too() -> None:
    async def never(_: Seen, __: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    engine = ScriptedEngine(never)
    async with routed(engine) as run:
        asking = asyncio.create_task(run.post())
        async with asyncio.timeout(DEADLINE_S):
            await engine.arrived.wait()
            asking.cancel()
            await engine.gone.wait()


async def refusal(run: Running, path: str = "/v1/chat/completions", body: object = None) -> tuple[int, str]:
    status, headers, text = await run.post(path, body)
    assert headers["x-request-id"]
    error = json.loads(text)["error"]
    assert error["code"] == status
    return status, error["message"]


async def test_what_the_router_refuses_itself() -> None:
    engine = ScriptedEngine()
    async with routed(engine) as run:
        assert await refusal(run, body=b"{nonsense") == (400, (await refusal(run, body=b"{nonsense"))[1])
        assert (await refusal(run, body=b"[1]"))[0] == 400
        status, why = await refusal(run, body=CHAT | {"model": "gpt"})
        assert status == 404
        assert "tiny" in why
        status, why = await refusal(run, body=CHAT | {"vllm_xargs": {"kv_cache_report_mode": "full"}})
        assert status == 400
        assert "kv_cache_report_mode" in why
        assert (await refusal(run, "/reset_prefix_cache"))[0] == 404
        assert (await refusal(run, "/v1/load_lora_adapter"))[0] == 404
        async with run.http.get(run.url + "/v1/chat/completions") as reply:
            assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert not engine.seen


async def test_re_announcing_is_let_through_where_the_operator_says_so() -> None:
    engine = ScriptedEngine()
    async with routed(engine, flags=(*NO_INDEXER, "--allow-kv-cache-report-mode", "true")) as run:
        status, _, _ = await run.post(body=CHAT | {"vllm_xargs": {"kv_cache_report_mode": "full"}})
        assert (status, len(engine.seen)) == (200, 1)


async def test_a_body_too_large_is_refused_with_or_without_a_length() -> None:
    async def without_length() -> object:
        for _ in range(4):
            yield b"x" * 1000

    engine = ScriptedEngine()
    async with routed(engine, flags=(*NO_INDEXER, "--body-bytes-max", "2048")) as run:
        assert (await refusal(run, body=b"x" * 3000))[0] == 413
        async with run.http.post(run.url + "/v1/completions", data=without_length()) as reply:
            assert reply.status == 413
        assert (await run.post())[0] == 200


async def test_a_body_that_never_ends_is_given_up() -> None:
    engine = ScriptedEngine()
    async with routed(engine, flags=(*NO_INDEXER, "--body-timeout-s", "0.2")) as run:
        reader, writer = await asyncio.open_connection("127.0.0.1", run.router.public_port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        async with asyncio.timeout(DEADLINE_S):
            assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_more_requests_than_allowed_are_told_to_come_back() -> None:
    go_on = asyncio.Event()

    async def when_told(_: Seen, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(answer(b"{}"))

    engine = ScriptedEngine(when_told)
    async with routed(engine, flags=(*NO_INDEXER, "--in-flight-max", "1")) as run:
        first = asyncio.create_task(run.post())
        await engine.arrived.wait()
        status, headers, _ = await run.post()
        assert (status, headers["retry-after"]) == (503, "1")
        go_on.set()
        assert (await first)[0] == 200


async def test_no_engine_is_a_503_with_a_time_to_come_back() -> None:
    async with running(*NO_INDEXER) as run:
        status, headers, _ = await run.post()
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert (await run.get("/readyz"))[0] == 503
        assert (await run.get("/healthz"))[0] == 200


async def test_keys_of_the_router_and_of_its_engines() -> None:
    engine = ScriptedEngine()
    environ = {"KVATLAS_API_KEYS": "one,two", "KVATLAS_ENGINE_API_KEY": "inner"}
    async with routed(engine, environ=environ) as run:
        assert (await run.post())[0] == 401
        assert (await run.post(headers={"Authorization": "Bearer three"}))[0] == 401
        assert (await run.get("/healthz"))[0] == 200
        assert (await run.post(headers={"Authorization": "Bearer two"}))[0] == 200
        assert (await run.post(headers={"x-api-key": "one"}))[0] == 200
        assert {s.header("authorization") for s in engine.seen} == {"Bearer inner"}


async def test_a_rank_is_named_to_the_engine() -> None:
    engine = ScriptedEngine()
    flags = (*NO_INDEXER, "--policy", "round-robin")
    async with engine, running("--engine", f"{engine.address},ranks=2", *flags, ready=2) as run:
        said = [(await run.post())[1]["x-kvatlas-engine"] for _ in range(4)]
        assert said == [engine.address, f"{engine.address}/dp1"] * 2
        assert [s.header("x-data-parallel-rank") for s in engine.seen] == ["0", "1"] * 2


async def test_models_of_the_whole_fleet() -> None:
    one = ScriptedEngine(models=("b", "a"))
    two = ScriptedEngine(models=("a", "c"))
    async with routed(one, two) as run:
        await run.until(lambda f: len(f.models()) == 3)
        status, page = await run.get("/v1/models")
        assert (status, [m["id"] for m in json.loads(page)["data"]]) == (200, ["a", "b", "c"])
        for _ in range(3):
            assert (await run.post(body=CHAT | {"model": "c"}))[1]["x-kvatlas-engine"] == two.address


async def test_a_usage_chunk_is_asked_for_and_dropped_when_the_operator_says_so() -> None:
    words = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % n for n in range(3)]
    usage = (
        b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":'
        b'{"cached_tokens":8}}}\n\n'
    )
    stream = [*words, usage, b"data: [DONE]\n\n"]
    engine = ScriptedEngine(streaming(stream))
    async with routed(engine, flags=(*NO_INDEXER, "--request-usage", "true")) as run:
        asked = CHAT | {"stream": True}
        _, _, body = await run.post(body=asked)
        assert body == b"".join(words) + b"data: [DONE]\n\n"
        assert json.loads(engine.seen[0].body) == asked | {"stream_options": {"include_usage": True}}
        wanted = asked | {"stream_options": {"include_usage": True}}
        _, _, body = await run.post(body=wanted)
        assert body == b"".join(stream)
        assert json.loads(engine.seen[1].body) == wanted


async def test_a_stored_response_is_asked_of_the_engine_that_keeps_it() -> None:
    def keeping(name: str) -> Callable[..., Awaitable[None]]:
        return replying(answer(json.dumps({"id": f"resp_{name}", "object": "response"}).encode()))

    one = ScriptedEngine(keeping("one"))
    two = ScriptedEngine(keeping("two"))
    async with routed(one, two) as run:
        for n in range(12):
            await run.post("/v1/responses", {"model": "tiny", "input": f"{n}"})
        assert one.seen, "both engines keep a response"
        assert two.seen, "both engines keep a response"
        for name, engine in (("one", one), ("two", two)):
            body = {"model": "tiny", "input": "next", "previous_response_id": f"resp_{name}"}
            assert (await run.post("/v1/responses", body))[1]["x-kvatlas-engine"] == engine.address
            assert (await run.get(f"/v1/responses/resp_{name}"))[0] == 200
            assert engine.seen[-1].target == f"/v1/responses/resp_{name}"


async def test_garbage_at_the_public_port_hurts_nobody() -> None:
    rng = random.Random(3)
    engine = ScriptedEngine()
    async with routed(engine) as run:
        for n in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", run.router.public_port)
            junk = rng.randbytes(rng.randint(1, 5000))
            writer.write(b"POST /v1/completions HTTP/1.1\r\n" + junk if n % 2 else junk)
            writer.write_eof()
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
            writer.close()
        assert (await run.post())[0] == 200


async def test_metrics_and_explanations_on_the_admin_port() -> None:
    engine = ScriptedEngine()
    async with routed(engine) as run:
        await run.post()
        async with run.http.get(run.admin_url + "/metrics") as reply:
            page = await reply.text()
            assert 'kvatlas_router_fail_open_total{cause="index-unavailable"} 1.0' in page
            assert 'kvatlas_router_requests_total{outcome="ok",path="/v1/chat/completions"} 1.0' in page
        async with run.http.post(run.admin_url + "/debug/route", json=CHAT) as reply:
            said = await reply.json()
            assert (said["engine"], said["reason"]) == (engine.address, "affinity:index-unavailable")
        assert len(engine.seen) == 1, "/debug/route forwards nothing"
