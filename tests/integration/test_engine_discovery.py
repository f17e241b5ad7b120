"""Finding engines and asking them about themselves, over real sockets: well, ill, hung, gone, back, and not HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from kvatlas_common.engines.discovery import watch
from kvatlas_common.engines.probe import AskFailed, CacheConfig, EngineFacts, ProbePlan, Prober, open_session, tokenize
from kvatlas_common.engines.specs import parse_engine, parse_source
from kvatlas_common.fleet import Adapter, Health, Load
from kvatlas_common.words import EngineId

METRICS = Path(__file__).parents[1] / "data" / "metrics" / "vllm-0.32-b32.txt.gz"
QUICK = ProbePlan(0.01, 0.01, 0.01, 0.01, 0.02, 0.02, timeout_s=5.0)
HASTY = replace(QUICK, timeout_s=0.3)  # where the answer never comes
DEADLINE_S = 30.0  # far more than is needed: machines are shared


class Engine:
    """What vLLM answers, as far as a probe asks; `filters` is whether its metrics page can be filtered."""

    def __init__(self, *, filters: bool = True, key: str | None = None) -> None:
        self.page = gzip.decompress(METRICS.read_bytes())
        self.health = 200
        self.filters = filters
        self.key = key
        self.models = [{"id": "tiny", "root": "/models/tiny", "parent": None, "max_model_len": 4096}]
        self.asked: dict[str, int] = {}
        self.port = 0
        self.tokenizing = asyncio.Event()  # /tokenize answers once it is set
        self.tokenizing.set()
        self._was_asked = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/metrics/", self._few)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def asked_times(self, path: str, times: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.asked.get(path, 0) < times:
                self._was_asked.clear()
                await self._was_asked.wait()

    def _count(self, request: web.Request) -> None:
        self.asked[request.path] = self.asked.get(request.path, 0) + 1
        self._was_asked.set()

    async def _health(self, request: web.Request) -> web.Response:
        self._count(request)
        return web.Response(status=self.health)

    async def _metrics(self, request: web.Request) -> web.Response:
        self._count(request)
        return web.Response(body=self.page)

    async def _few(self, request: web.Request) -> web.Response:
        self._count(request)
        if not self.filters:
            return web.Response(status=307, headers={"Location": "/metrics"})
        names = [name.encode() for name in request.query.getall("name[]")]
        lines = [line for line in self.page.splitlines(True) if any(line.startswith(name) for name in names)]
        return web.Response(body=b"".join(lines))

    async def _models(self, request: web.Request) -> web.Response:
        self._count(request)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": self.models})

    async def _tokenize(self, request: web.Request) -> web.Response:
        self._count(request)
        await self.tokenizing.wait()
        prompt = (await request.json()).get("prompt")
        if prompt is None:
            return web.json_response({"error": "no prompt"}, status=400)
        return web.json_response({"count": len(prompt), "tokens": [ord(c) for c in prompt]})


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


class Reports:
    """The last facts of each engine, and a way to wait for some."""

    def __init__(self) -> None:
        self.last: dict[EngineId, EngineFacts] = {}
        self.loads: dict[EngineId, Load] = {}
        self.count = 0
        self._news = asyncio.Event()

    def take(self, facts: EngineFacts) -> None:
        self.last[facts.id] = facts
        self.count += 1
        self._news.set()

    def take_load(self, engine: EngineId, load: Load) -> None:
        self.loads[engine] = load
        self.count += 1
        self._news.set()

    async def until_load(self, address: str, holds: Callable[[Load], bool]) -> Load:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                load = self.loads.get(EngineId.parse(address))
                if load is not None and holds(load):
                    return load
                self._news.clear()
                await self._news.wait()

    async def until(self, address: str, holds: Callable[[EngineFacts], bool]) -> EngineFacts:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                facts = self.last.get(EngineId.parse(address))
                if facts is not None and holds(facts):
                    return facts
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def probing(reports: Reports, plan: ProbePlan = QUICK) -> AsyncIterator[Prober]:
    async with (
        open_session() as session,
        Prober(
            session,
            reports.take,
            reports.take_load,
            clock=time.monotonic,
            wall=time.time,
            rng=random.Random(1),
            plan=plan,
        ) as prober,
    ):
        yield prober


def ready(facts: EngineFacts) -> bool:
    return facts.health is Health.READY and not facts.error and bool(facts.models)


@asynccontextmanager
async def stranger(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Something that listens and does what it likes; gives its address."""
    done = asyncio.Event()
    handling: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        talking, closing = asyncio.ensure_future(answer(reader, writer)), asyncio.ensure_future(done.wait())
        await asyncio.wait([talking, closing], return_when=asyncio.FIRST_COMPLETED)
        for part in (talking, closing):
            part.cancel()
        await asyncio.gather(talking, closing, return_exceptions=True)
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        server.close()
        await server.wait_closed()
        await asyncio.gather(*handling)


@pytest.mark.parametrize("filters", [True, False])
async def test_a_well_engine_is_known_completely_and_reported_once(filters: bool) -> None:
    reports = Reports()
    async with serving(Engine(filters=filters)) as engine, probing(reports) as prober:
        engine.models.append({"id": "sql", "root": "/loras/sql", "parent": "tiny"})
        prober.want([parse_engine(engine.address)])
        facts = await reports.until(engine.address, ready)
        assert facts.models == {"tiny", "sql"}
        assert facts.adapters == (Adapter("sql", "/loras/sql", 1),)
        assert (facts.root, facts.max_model_len) == ("/models/tiny", 4096)
        assert facts.process_start_s == 1795295284.66
        assert facts.cache == CacheConfig(32, 32768, "sha256", True, None)
        engine.page = engine.page.replace(
            b'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0',
            b'vllm:num_requests_running{engine="0",model_name="tiny"} 7.0',
        )
        load = await reports.until_load(engine.address, lambda found: found.running == 7)
        assert abs(load.scraped_at - time.time()) < 5
        engine.page = engine.page.replace(b"} 7.0", b"} 0.0")
        await reports.until_load(engine.address, lambda found: found.running == 0)
        told, before = reports.count, engine.asked["/health"]
        await engine.asked_times("/health", before + 5)
        assert reports.count == told
        assert engine.asked["/metrics/"] == 1 or filters
        assert "/metrics" not in engine.asked or not filters


async def test_ill_then_gone_then_back_with_other_models() -> None:
    reports = Reports()
    async with serving(Engine()) as engine, probing(reports) as prober:
        prober.want([parse_engine(engine.address)])
        await reports.until(engine.address, ready)
        engine.health = 503
        facts = await reports.until(engine.address, lambda f: f.health is Health.DOWN)
        assert "/health answered 503" in facts.error
        assert facts.models == {"tiny"}
        await engine.stop()
        facts = await reports.until(engine.address, lambda f: "nobody listens" in f.error)
        engine.health, engine.models = 200, [{"id": "other", "root": "/o", "parent": None}]
        await engine.start()
        facts = await reports.until(engine.address, ready)
        assert (facts.models, facts.root) == (frozenset({"other"}), "/o")


async def test_a_wrong_key_is_named_with_the_cure_and_the_right_one_works() -> None:
    reports = Reports()
    async with serving(Engine(key="sesame")) as engine, probing(reports) as prober:
        prober.want([parse_engine(engine.address)])
        facts = await reports.until(engine.address, lambda f: "401" in f.error)
        assert facts.health is Health.READY
        assert "api-key-env" in facts.error
        prober.want([parse_engine(f"{engine.address},api-key-env=K", environ={"K": "sesame"})])
        await reports.until(engine.address, ready)


async def test_nothing_is_said_of_an_engine_that_is_not_wanted_any_more() -> None:
    reports = Reports()
    async with serving(Engine()) as one, serving(Engine()) as two, probing(reports) as prober:
        prober.want([parse_engine(one.address), parse_engine(two.address)])
        await asyncio.gather(*(reports.until(e.address, ready) for e in (one, two)))
        prober.want([parse_engine(two.address)])
        one.health = two.health = 503
        await reports.until(two.address, lambda f: f.health is Health.DOWN)
        assert reports.last[EngineId(one.address)].health is Health.READY


async def test_strangers_at_the_port_are_down_and_harm_nobody() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return

    async def noisy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(random.Random(3).randbytes(4096))
        await writer.drain()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    reports = Reports()
    async with (
        stranger(silent) as a,
        stranger(rude) as b,
        stranger(noisy) as c,
        stranger(drip) as d,
        serving(Engine()) as engine,
        probing(reports, HASTY) as prober,
    ):
        prober.want([parse_engine(address) for address in (a, b, c, d, engine.address)])
        for address in (a, b, c, d):
            facts = await reports.until(address, lambda f: f.health is Health.DOWN)
            assert facts.error.startswith("/health")
        await reports.until(engine.address, ready)


async def test_a_page_without_end_is_cut_off() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    reports = Reports()
    async with stranger(flood) as address, probing(reports, ProbePlan(0.01, 0.01, 0.01, 0.01, timeout_s=5)) as prober:
        prober.want([parse_engine(address)])
        facts = await reports.until(address, lambda f: f.health is Health.DOWN)
        assert "larger than" in facts.error


async def test_what_a_report_raises_ends_the_prober() -> None:
    def broken(facts: EngineFacts) -> None:
        raise KeyError(str(facts.id))

    async def probe(session: aiohttp.ClientSession, address: str) -> None:
        prober = Prober(session, broken, clock=time.monotonic, wall=time.time, rng=random.Random(1), plan=QUICK)
        async with asyncio.timeout(DEADLINE_S), prober:
            prober.want([parse_engine(address)])
            await asyncio.Event().wait()

    async with serving(Engine()) as engine, open_session() as session:
        with pytest.raises(ExceptionGroup) as caught:
            await probe(session, engine.address)
        assert caught.group_contains(KeyError, match=engine.address)


async def test_tokenize_gives_ids_or_one_error_without_the_prompt() -> None:
    async with serving(Engine()) as engine, open_session() as session:
        url = f"http://{engine.address}"
        found = await tokenize(session, url, {"model": "tiny", "prompt": "hé"}, api_key=SecretStr("k"))
        assert found == (ord("h"), ord("é"))
        with pytest.raises(AskFailed, match="/tokenize answered 400") as refused:
            await tokenize(session, url, {"model": "tiny", "messages": [{"content": "secret"}]})
        assert refused.value.status == 400
        assert "secret" not in str(refused.value)
    async with open_session() as session:
        with pytest.raises(AskFailed) as gone:
            await tokenize(session, url, {"prompt": "x"})
        assert gone.value.refused


async def test_slow_answers_to_others_do_not_make_an_engine_look_hung() -> None:
    """The session is shared: a probe that queued behind them for a connection would find the engine down."""
    engine, reports, hanging = Engine(), Reports(), 20
    engine.tokenizing = asyncio.Event()
    async with serving(engine), open_session() as session:
        prober = Prober(session, reports.take, clock=time.monotonic, wall=time.time, rng=random.Random(1), plan=QUICK)
        url = f"http://{engine.address}"
        asked = [asyncio.ensure_future(tokenize(session, url, {"prompt": "x"})) for _ in range(hanging)]
        await engine.asked_times("/tokenize", hanging)
        async with prober:
            prober.want([parse_engine(engine.address)])
            await reports.until(engine.address, ready)
            engine.tokenizing.set()
            assert await asyncio.gather(*asked) == [(ord("x"),)] * hanging


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    reached: list[str] = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 307 x\r\nLocation: http://{elsewhere}/\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    async def thief(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append((await reader.readuntil(b"\r\n\r\n")).decode())

    async with stranger(thief) as elsewhere, stranger(redirect) as address, open_session() as session:
        with pytest.raises(AskFailed, match="answered 307"):
            await tokenize(session, f"http://{address}", {"prompt": "x"}, api_key=SecretStr("sesame"))
    assert reached == []


async def test_from_a_name_and_a_config_map_to_facts(tmp_path: Path) -> None:
    """The whole way: a name resolved by the system, a list swapped by a link, engines probed as they come and go."""
    reports = Reports()
    async with serving(Engine()) as named, serving(Engine()) as listed, probing(reports) as prober:
        for version, engines in (("..v1", []), ("..v2", [{"address": listed.address}])):
            (tmp_path / version).mkdir()
            (tmp_path / version / "engines.yaml").write_text(json.dumps(engines))
        (tmp_path / "..data").symlink_to("..v1")
        (tmp_path / "engines.yaml").symlink_to("..data/engines.yaml")
        sources = [parse_source(f"dns:localhost:{named.port}"), parse_source(f"file:{tmp_path / 'engines.yaml'}")]

        async def follow() -> None:
            async with aclosing(watch(sources, refresh_s=0.01)) as found:
                async for specs in found:
                    prober.want(specs)

        following = asyncio.create_task(follow())
        try:
            await reports.until(named.address, ready)
            assert EngineId(listed.address) not in reports.last
            (tmp_path / "..next").symlink_to("..v2")
            (tmp_path / "..next").rename(tmp_path / "..data")
            await reports.until(listed.address, ready)
        finally:
            following.cancel()
            await asyncio.wait([following])


async def test_a_refused_port_is_known_for_what_it_is() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"localhost:{unused.getsockname()[1]}"
        reports = Reports()
        async with probing(reports, ProbePlan(0.01, 0.01, 0.01, 0.01, failures_to_down=1000)) as prober:
            prober.want([parse_engine(address)])
            facts = await reports.until(address, lambda f: f.health is Health.DOWN)
            assert facts.error == "/health: nobody listens there"
