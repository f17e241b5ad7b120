"""REST over a real socket, in somebody else's event loop: answers, errors, limits, the page, starting and stopping."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from kvatlas_common.blocks.extras import Lora, PromptExtras
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.fleet import Adapter, EngineView, Fleet, Health, InFlight, Load, Sync
from kvatlas_common.history import ESTIMATE_PROFILE
from kvatlas_common.matching import EngineMatch, Holder, MatchAnswer, Prompts
from kvatlas_common.words import KEY_MASK, EngineId, Medium
from kvatlas_indexer.adapters.addresses import AddressUnavailable
from kvatlas_indexer.adapters.http_server import HttpServer
from kvatlas_indexer.adapters.rest import BODY_BYTES_MAX, build_app, serve
from kvatlas_indexer.core.contracts import FleetDelta, UnknownModel

NEW, OLD = "sha256_cbor/b16/tagged/seed=42", "sha256_cbor_64bit/b16/lora-id/seed=42"
FIRST, SECOND, THIRD = EngineId("10.0.0.1:8000"), EngineId("10.0.0.1:8000", 1), EngineId("10.0.0.2:8000")
BIG = KEY_MASK  # no JavaScript number holds it
TOKENS = list(range(100, 149))  # three whole blocks of 16, and the last token


def view(engine: EngineId, **known: Any) -> EngineView:
    return EngineView(engine, f"http://{engine.address}", **{"models": frozenset({"m"}), **known})


EXACT = view(
    FIRST,
    models=frozenset({"m", "sql"}),
    adapters=(Adapter("sql", "/adapters/sql", 1),),
    health=Health.READY,
    profile=NEW,
    profile_verified=True,
    block_size=16,
    sync=Sync.EXACT,
    kv_tokens=65_536,
)
LOAD = Load(3, 1, 0.5, 1_700_000_000.0, frozenset({"sql"}), InFlight(1, 700, 2))
UNKNOWN = view(SECOND)


class KnownAnswers:
    """An index that remembers what it was asked."""

    def __init__(self) -> None:
        self.views = [EXACT, UNKNOWN]
        self.asked: list[tuple[str, dict[str, list[int]], tuple[EngineId, ...]]] = []
        self.broken = self.estimated = False
        self.ready = True

    async def match(
        self,
        model: str,
        prompts: Prompts,
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        if self.broken:
            raise RuntimeError("a bug, with a secret in it")
        if not self.fleet().serving(model):
            raise UnknownModel(model)
        self.asked.append((model, {name: list(keys) for name, keys in prompts.items()}, tuple(engines)))
        self.estimated = estimate
        few = EngineMatch(FIRST, 1, {Medium.GPU: 1}, exact=True)
        many = EngineMatch(THIRD, 3, {Medium.GPU: 2, Medium.CPU: 1}, exact=False, doubtful=2, expected=5)
        return MatchAnswer((few, many), (SECOND,))

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        if model != "m":
            raise UnknownModel(model)
        held = (Holder(FIRST, 0, Medium.GPU, 2, doubtful=True),)
        return tuple(held if key == BIG else () for key in keys)

    def fleet(self) -> Fleet:
        return Fleet.of(self.views)

    def load(self, engine: EngineId) -> Load:
        return LOAD if engine == FIRST else Load()

    async def watch(self, router: str = "") -> AsyncIterator[FleetDelta]:
        yield FleetDelta(snapshot=True)


class Client:
    def __init__(self, session: aiohttp.ClientSession, server: HttpServer, index: KnownAnswers) -> None:
        self.index, self.server, self.session = index, server, session
        self.base = f"http://127.0.0.1:{server.port}"

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.base + path) as response:
            return response.status, await response.json()

    async def match(self, **body: Any) -> tuple[int, Any]:
        async with self.session.post(self.base + "/v1/match", json=body) as response:
            return response.status, await response.json()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    index, registry, held = KnownAnswers(), CollectorRegistry(), {FIRST: {Medium.GPU: 7, Medium.CPU: 2}}
    Counter("kvatlas_things", "Things counted.", registry=registry).inc(3)
    app = build_app(index, ready=lambda: index.ready, registry=registry, blocks=lambda e: held.get(e, {}))
    server = await serve(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(session, server, index)
    await server.stop()


def error(message: str, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code}}


async def test_engines_with_all_that_is_known(client: Client) -> None:
    status, answer = await client.get("/v1/engines")
    assert status == 200
    exact, unknown = answer["engines"]
    assert exact == {
        "id": "10.0.0.1:8000",
        "url": "http://10.0.0.1:8000",
        "rank": 0,
        "models": ["m", "sql"],
        "adapters": [{"name": "sql", "path": "/adapters/sql", "number": 1}],
        "root": None,
        "health": "ready",
        "load": {
            "running": 3,
            "waiting": 1,
            "kv_usage": 0.5,
            "scraped_at": 1_700_000_000.0,
            "loras": ["sql"],
            "in_flight": {"prefilling": 1, "prefill_tokens": 700, "decoding": 2},
        },
        "profile": NEW,
        "profile_verified": True,
        "block_size": 16,
        "sync": "exact",
        "inexact_reason": "",
        "max_model_len": None,
        "kv_tokens": 65_536,
        "labels": {},
        "blocks": {"gpu": 7, "cpu": 2},
    }
    assert (unknown["id"], unknown["blocks"], unknown["load"]["scraped_at"]) == ("10.0.0.1:8000/dp1", None, None)
    assert await client.get("/v1/engines/10.0.0.1:8000") == (200, exact)
    assert await client.get("/v1/engines/10.0.0.1:8000/dp1") == (200, unknown)
    assert await client.get("/v1/engines/10.0.0.9:8000") == (
        404,
        error("engine 10.0.0.9:8000 is not known", "engine_not_found"),
    )
    status, refusal = await client.get("/v1/engines/nonsense")
    assert (status, refusal["error"]["code"]) == (400, "invalid_engine")


@pytest.mark.parametrize("key", [str(BIG), hex(BIG), hex(BIG).upper().replace("X", "x")])
async def test_a_block_by_its_key_in_any_writing(client: Client, key: str) -> None:
    holder = {"engine": "10.0.0.1:8000", "group": 0, "medium": "gpu", "copies": 2, "doubtful": True}
    assert await client.get(f"/v1/blocks/{key}?model=m") == (
        200,
        {"key": str(BIG), "model": "m", "holders": [holder]},
    )


async def test_a_block_nobody_holds_and_one_of_no_model(client: Client) -> None:
    assert await client.get("/v1/blocks/1?model=m") == (200, {"key": "1", "model": "m", "holders": []})
    status, refusal = await client.get("/v1/blocks/1?model=who")
    assert (status, refusal["error"]["code"]) == (404, "model_not_found")
    status, refusal = await client.get("/v1/blocks/1")
    assert (status, refusal["error"]["code"]) == (400, "model_required")
    client.index.views = [UNKNOWN]
    assert (await client.get("/v1/blocks/1"))[0] == 200  # one model only: it need not be said


@pytest.mark.parametrize("key", ["-1", str(1 << 64), "0x1ffffffffffffffff", "1.5", "abc", "0x", "%20", "0xzz", "٣"])
async def test_what_is_no_key_is_refused(client: Client, key: str) -> None:
    status, refusal = await client.get(f"/v1/blocks/{key}?model=m")
    assert (status, refusal["error"]["code"]) == (400, "invalid_key")


async def test_many_blocks_at_once(client: Client) -> None:
    async def ask(**body: Any) -> tuple[int, Any]:
        async with client.session.post(client.base + "/v1/blocks", json=body) as response:
            return response.status, await response.json()

    _, first = await client.get(f"/v1/blocks/{BIG}?model=m")
    _, second = await client.get("/v1/blocks/1?model=m")
    assert first["holders"]
    assert not second["holders"]
    assert await ask(model="m", keys=[hex(BIG), 1, BIG]) == (200, {"blocks": [first, second, first]})
    assert (await ask(keys=[1]))[1]["error"]["code"] == "model_required"
    assert (await ask(model="who", keys=[1]))[0] == 404
    assert (await ask(model="m", keys=[-1]))[1]["error"]["message"].startswith("keys.0: -1 is not a block key")
    assert (await ask(model="m", keys=[1] * 1025))[0] == 400


async def test_a_match_of_keys_as_numbers_and_strings(client: Client) -> None:
    status, answer = await client.match(model="m", keys=[1, "2", hex(BIG), BIG], engines=["10.0.0.1:8000/dp1"])
    assert client.index.asked == [("m", {NEW: [1, 2, BIG, BIG]}, (SECOND,))]
    assert (status, answer) == (
        200,
        {
            "model": "m",
            "prompts": [{"profile": NEW, "keys": ["1", "2", str(BIG), str(BIG)]}],
            "engines": [
                {
                    "engine": "10.0.0.2:8000",
                    "blocks": 3,
                    "media": {"gpu": 2, "cpu": 1},
                    "exact": False,
                    "doubtful": 2,
                    "expected": 5,
                },
                {
                    "engine": "10.0.0.1:8000",
                    "blocks": 1,
                    "media": {"gpu": 1},
                    "exact": True,
                    "doubtful": 0,
                    "expected": 1,
                },
            ],
            "unknown": ["10.0.0.1:8000/dp1"],
        },
    )


def keys_of(profile: str, extras: PromptExtras) -> list[int]:
    keys: list[int] = prompt_keys(HashProfile.parse(profile), TOKENS, extras).tolist()
    assert len(keys) == 3
    return keys


async def test_token_ids_are_hashed_by_every_profile_of_the_model(client: Client) -> None:
    client.index.views = [EXACT, UNKNOWN, view(THIRD, profile=OLD)]
    assert (await client.match(model="m", token_ids=TOKENS, cache_salt="s"))[0] == 200
    assert (await client.match(model="m", token_ids=TOKENS, profile=OLD))[0] == 200
    assert (await client.match(model="sql", token_ids=TOKENS))[0] == 200
    salted, plain, adapted = (asked[1] for asked in client.index.asked)
    assert salted == {name: keys_of(name, PromptExtras(cache_salt="s")) for name in (NEW, OLD)}
    assert plain == {OLD: keys_of(OLD, PromptExtras())}
    assert adapted == {NEW: keys_of(NEW, PromptExtras(Lora("sql", 1, "/adapters/sql")))}


async def test_an_estimate_is_asked_with_the_keys_of_engines_whose_profile_is_not_known_too(client: Client) -> None:
    assert (await client.match(model="m", token_ids=TOKENS * 2, estimate=True))[0] == 200
    assert client.index.estimated
    (asked,) = client.index.asked
    assert {name: len(keys) for name, keys in asked[1].items()} == {NEW: 6, ESTIMATE_PROFILE.name: 1}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"keys": [1]}, "model: Field required"),
        ({"model": "m"}, "give either keys or token_ids"),
        ({"model": "m", "keys": [1], "token_ids": [1]}, "give either keys or token_ids"),
        ({"model": "m", "keys": [1], "cache_salt": "s"}, "cache_salt goes with token_ids"),
        ({"model": "m", "keys": [1, -2]}, "keys.1: -2 is not a block key"),
        ({"model": "m", "keys": [True]}, "keys.0: True is not a block key"),
        ({"model": "m", "keys": [1.5]}, "keys.0: '1.5' is not a block key"),
        ({"model": "m", "token_ids": ["1"]}, "token_ids.0: "),
        ({"model": "m", "token_ids": [-1]}, "token_ids.0: "),
        ({"model": "m", "token_ids": [1], "engines": ["nonsense"]}, "engines.0: engine 'nonsense' is not"),
        ({"model": "m", "token_ids": [1], "profile": "nonsense"}, "profile: hash profile 'nonsense' is not"),
        ({"model": "m", "keys": [1], "prompt": "text"}, "prompt: Extra inputs are not permitted"),
        ({"model": "m", "keys": [0] * 65_537}, "keys: List should have at most 65536 items"),
    ],
)
async def test_a_wrong_match_request_is_told_which_field(client: Client, body: dict[str, Any], said: str) -> None:
    status, refusal = await client.match(**body)
    assert (status, refusal["error"]["type"]) == (400, "invalid_request_error")
    assert refusal["error"]["message"].startswith(said)
    assert client.index.asked == []


async def test_keys_of_two_profiles_are_not_guessed_apart(client: Client) -> None:
    client.index.views = [EXACT, view(THIRD, profile=OLD)]
    status, refusal = await client.match(model="m", keys=[1])
    assert (status, refusal["error"]["code"]) == (400, "profile_required")
    assert (await client.match(model="m", keys=[1], profile=OLD))[0] == 200
    assert client.index.asked == [("m", {OLD: [1]}, ())]


async def test_errors_have_one_shape(client: Client) -> None:
    assert await client.match(model="who", keys=[1]) == (
        404,
        error("model: no engine serves it: who", "model_not_found"),
    )
    assert await client.get("/nowhere") == (404, error("Not Found", "not_found"))
    assert await client.get("/v1/match") == (405, error("Method Not Allowed", "method_not_allowed"))
    async with client.session.post(
        client.base + "/v1/match", data=b"{", headers={"content-type": "application/json"}
    ) as r:
        assert (r.status, (await r.json())["error"]["code"]) == (400, "invalid_request")


async def test_an_error_of_ours_says_nothing_of_the_inside(client: Client) -> None:
    client.index.broken = True
    status, answer = await client.match(model="m", keys=[1])
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in str(answer)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_long_is_refused_unread(client: Client, chunked: bool) -> None:
    piece = b" " * 65_536

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(BODY_BYTES_MAX // len(piece) + 1):
            yield piece

    body: Any = pieces() if chunked else io.BytesIO(piece * (BODY_BYTES_MAX // len(piece) + 1))
    headers = {"content-type": "application/json"}
    try:
        async with client.session.post(client.base + "/v1/match", data=body, headers=headers) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (413, "too_large")
    except aiohttp.ClientOSError:  # closed on us while we were still sending: refused as well
        pass
    assert (await client.get("/healthz"))[0] == 200


async def test_health_readiness_and_metrics(client: Client) -> None:
    assert await client.get("/healthz") == (200, {"status": "ok"})
    assert await client.get("/readyz") == (200, {"status": "ready"})
    client.index.ready = False
    assert await client.get("/readyz") == (503, {"status": "not ready"})
    async with client.session.get(client.base + "/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=")
        assert "kvatlas_things_total 3.0" in await response.text()
    async with client.session.get(
        client.base + "/metrics", headers={"accept": "application/openmetrics-text"}
    ) as response:
        assert (await response.text()).endswith("# EOF\n")


async def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    async with client.session.get(client.base + "/") as response:
        page = await response.text()
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "<title>KV Atlas</title>" in page
    assert not any(
        foreign in page.replace("http://www.w3.org/2000/svg", "") for foreign in ("http:", "https:", "innerHTML")
    )


async def test_a_port_in_use_is_named_with_the_cure(client: Client) -> None:
    port = client.server.port
    app = build_app(client.index, ready=lambda: True, registry=CollectorRegistry())
    with pytest.raises(AddressUnavailable, match=rf"HTTP on 127\.0\.0\.1:{port}: .*in use.*--rest-listen"):
        await serve(app, "127.0.0.1", port)


async def test_stopping_answers_what_is_under_way_and_leaves_signals_alone() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    server = await serve(app, "127.0.0.1", 0)
    assert signal.getsignal(signal.SIGTERM) is handler
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        request = asyncio.create_task(session.get(f"http://127.0.0.1:{server.port}/"))
        await asked.wait()
        stopping = asyncio.create_task(server.stop())
        may_answer.set()
        assert await (await request).text() == "ok"
        await stopping
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))
        again.listen()
