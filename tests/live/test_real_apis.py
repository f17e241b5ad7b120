"""Every API of a real engine through the router: which it serves, that what is predicted is what it reports, and that
one request is one trace down to the engine's own span.

`make test-vllm`; two to four minutes on two cores, nearly all of it the engines' start.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvatlas_router.core.usage import read_usage
from tests.live.deployment import MODEL, Configuration, Deployment, deploy, make_model

VLLM = os.environ.get("KVATLAS_VLLM", "")
TRACE = "0af7651916cd43dd8448eb211c80319c"
EVENTS_DEADLINE_S = 20.0
STORY = " ".join(f"On day {n} the ship passed another island and nobody spoke." for n in range(40))
QUESTION, ANSWER, NEXT = f"{STORY} What next?", "An island rose out of the fog.", "And then? " + STORY[:600]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM, reason="KVATLAS_VLLM is not set: name a virtual environment with vLLM in it"),
]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What was exported: (service, name of span) by trace."""

    def __init__(self) -> None:
        self.traces: dict[str, list[tuple[str, str]]] = {}

    def Export(self, request: Any, context: object) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = next((a.value.string_value for a in resource.resource.attributes if a.key == "service.name"), "")
            for span in itertools.chain.from_iterable(scope.spans for scope in resource.scope_spans):
                self.traces.setdefault(span.trace_id.hex(), []).append((service, span.name))
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True, slots=True)
class Run:
    deployment: Deployment
    collector: Collector


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    venv, folder = Path(VLLM), tmp_path_factory.mktemp("apis")
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    configuration = Configuration(
        "apis",
        "full",
        ("--block-size", "32", "--prefix-caching-hash-algo", "sha256_cbor", "--otlp-traces-endpoint", endpoint),
        {"PYTHONHASHSEED": "42", "VLLM_ENABLE_RESPONSES_API_STORE": "1", "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with deploy(venv, make_model(venv, folder / "full", "full"), configuration, folder) as deployment:
            yield Run(deployment, collector)
    server.stop(None)


@pytest.fixture
async def http() -> Any:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def page(self) -> Any:
        return json.loads(self.raw)

    @property
    def predicted(self) -> int:
        return int(self.headers.get("x-kvatlas-cached-tokens", -1))


async def ask(http: aiohttp.ClientSession, run: Run, path: str, body: dict[str, Any], **headers: str) -> Answer:
    body = {"model": MODEL} | body
    async with http.post(run.deployment.router + path, json=body, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


async def exact(http: aiohttp.ClientSession, run: Run, path: str, body: dict[str, Any], salt: str) -> int:
    """Asks until the events of what went before have arrived; then what is predicted is what the engine reports."""
    async with asyncio.timeout(EVENTS_DEADLINE_S):
        while True:
            answer = await ask(http, run, path, body | {"cache_salt": salt})
            assert answer.status == 200, answer.raw[:300]
            actual = read_usage(answer.raw).cached_tokens
            if answer.headers["x-kvatlas-reason"] == "precise" and answer.predicted == actual and actual:
                return actual
            await asyncio.sleep(0.1)


CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": NEXT},
]
SAME = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4, "stream_options": {"include_usage": True}},
    "/v1/messages": {"system": "You are brief.", "messages": CHAT[1:], "max_tokens": 4},
    "/v1/responses": {"instructions": "You are brief.", "input": CHAT[1:], "max_output_tokens": 4},
}


@pytest.mark.parametrize("path", SAME)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_conversation_by_any_api_is_routed_precisely(
    run: Run, http: aiohttp.ClientSession, path: str, stream: bool
) -> None:
    salt = f"{path.rpartition('/')[2]}-{stream}"
    asked = {k: v for k, v in SAME[path].items() if stream or k != "stream_options"}  # refused without a stream
    whole = await exact(http, run, path, asked | {"stream": stream}, salt=salt)
    by_chat = await exact(http, run, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 4}, salt=salt)
    assert whole == by_chat, "the other API's prompt is not the chat's"
    assert whole > 500


async def test_a_first_turn_by_one_api_is_found_by_the_next(run: Run, http: aiohttp.ClientSession) -> None:
    first = await ask(http, run, "/v1/messages", {"messages": CHAT[1:2], "max_tokens": 4, "cache_salt": "turns"})
    assert first.status == 200
    cached = await exact(http, run, "/v1/responses", {"input": CHAT[1:], "max_output_tokens": 4}, salt="turns")
    assert cached > 300


async def test_what_messages_say_in_blocks_and_of_tools_is_predicted(run: Run, http: aiohttp.ClientSession) -> None:
    blocks = [{"type": "text", "text": STORY}, {"type": "text", "text": "What next?"}]
    body = {"messages": [{"role": "user", "content": blocks}], "max_tokens": 4}
    assert await exact(http, run, "/v1/messages", body, salt="blocks") > 300


async def test_completions_of_token_ids(run: Run, http: aiohttp.ClientSession) -> None:
    tokenised = await ask(http, run, "/tokenize", {"prompt": STORY})
    assert tokenised.status == 200
    ids = tokenised.page["tokens"]
    answers = [await ask(http, run, "/v1/completions", {"prompt": ids, "max_tokens": 4, "cache_salt": "ids"})]
    assert await exact(http, run, "/v1/completions", {"prompt": ids, "max_tokens": 4}, salt="ids") > 300
    assert answers[0].page["usage"]["prompt_tokens"] == len(ids)


async def test_a_response_goes_on_where_it_is_kept(run: Run, http: aiohttp.ClientSession) -> None:
    engines = set()
    for number in range(4):
        first = await ask(http, run, "/v1/responses", {"input": f"Story {number}.", "max_output_tokens": 4})
        assert first.status == 200
        home, kept = first.headers["x-kvatlas-engine"], first.page["id"]
        engines.add(home)
        after = await ask(
            http, run, "/v1/responses", {"input": "And then?", "previous_response_id": kept, "max_output_tokens": 4}
        )
        assert (after.status, after.headers["x-kvatlas-engine"]) == (200, home)
        assert after.headers["x-kvatlas-reason"] == "affinity:unrenderable:previous_response_id"
        async with http.get(f"{run.deployment.router}/v1/responses/{kept}") as read:
            assert (read.status, (await read.json())["id"]) == (200, kept)
    assert engines <= set(run.deployment.engines)


async def test_what_is_passed_through(run: Run, http: aiohttp.ClientSession) -> None:
    async with http.get(run.deployment.router + "/v1/models") as models:
        assert [card["id"] for card in (await models.json())["data"]] == [MODEL]
    counted = await ask(http, run, "/v1/messages/count_tokens", {"messages": CHAT[1:2]})
    assert (counted.status, counted.page["input_tokens"] > 300) == (200, True)
    embedded = await ask(http, run, "/v1/embeddings", {"input": "x"})
    async with http.post(
        f"http://{run.deployment.engines[0]}/v1/embeddings", json={"model": MODEL, "input": "x"}
    ) as own:
        assert (embedded.status, embedded.raw) == (own.status, await own.read())  # a model that only generates


async def test_a_request_is_one_trace_down_to_the_engines_own_span(run: Run, http: aiohttp.ClientSession) -> None:
    came = f"00-{TRACE}-b7ad6b7169203331-01"
    assert (await ask(http, run, "/v1/messages", SAME["/v1/messages"], traceparent=came)).status == 200
    wanted = {
        ("kvatlas-router", "POST /v1/messages"),
        ("kvatlas-router", f"chat {MODEL}"),
        ("kvatlas-indexer", "kvatlas.v1.KvIndex/Match"),
    }
    async with asyncio.timeout(EVENTS_DEADLINE_S):
        while not wanted <= (found := set(run.collector.traces.get(TRACE, ()))) or "llm_request" not in {
            name for _, name in found
        }:
            await asyncio.sleep(0.1)
