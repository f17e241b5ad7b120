"""The gRPC service over a real channel: answers, refusals, endless streams, and the drain."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvatlas_common import wire
from kvatlas_common.fleet import EngineView, Fleet, Health, InFlight, Load, Sync
from kvatlas_common.matching import EngineMatch, Holder, MatchAnswer, Prompts
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.proto.kvatlas.v1 import index_pb2_grpc as pb_grpc
from kvatlas_common.words import KEY_MASK, EngineId, Medium
from kvatlas_indexer.adapters.addresses import AddressUnavailable
from kvatlas_indexer.adapters.grpc_server import ROUTER_METADATA, SERVICE, GrpcOptions, GrpcServer
from kvatlas_indexer.adapters.matches import PROFILES_MAX
from kvatlas_indexer.core.contracts import FleetDelta, UnknownModel

DEADLINE_S = 30.0  # far more than is needed: machines are shared
KEYS_MAX = 1_000
PROFILE = "sha256_cbor/b16/tagged/seed=42"
FIRST, SECOND = EngineId("10.0.0.1:8000"), EngineId("10.0.0.1:8000", 1)


class KnownAnswers:
    """An index of one model that remembers what it was asked, and whose fleet changes when told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, list[int]], tuple[EngineId, ...]]] = []
        self.deltas: asyncio.Queue[FleetDelta] = asyncio.Queue()
        self.watch_closed = asyncio.Event()
        self.estimated = False
        self.watched_by: list[str] = []
        self.being_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def match(
        self,
        model: str,
        prompts: Prompts,
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        if model != "m":
            raise UnknownModel(model)
        self.asked.append((model, {p: list(keys) for p, keys in prompts.items()}, tuple(engines)))
        self.estimated = estimate
        self.being_asked.set()
        await self.may_answer.wait()
        match = EngineMatch(FIRST, 3, {Medium.GPU: 2, Medium.CPU: 1}, exact=True, doubtful=1, expected=5)
        return MatchAnswer((match,), (SECOND,))

    async def holders(self, model: str, keys: Sequence[int]) -> tuple[tuple[Holder, ...], ...]:
        raise NotImplementedError

    def fleet(self) -> Fleet:
        return Fleet()

    def load(self, engine: EngineId) -> Load:
        return Load()

    async def watch(self, router: str = "") -> AsyncIterator[FleetDelta]:
        self.watched_by.append(router)
        try:
            while True:
                yield await self.deltas.get()
        finally:
            self.watch_closed.set()


class Heard:
    """What routers report, and who."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.routers: list[tuple[str, str]] = []

    def joined(self, router: str) -> None:
        self.routers.append(("joined", router))

    def reported(self, router: str, observation: Observation) -> None:
        self.observations.append(observation)

    def left(self, router: str) -> None:
        self.routers.append(("left", router))


class Running:
    def __init__(self, index: KnownAnswers, heard: Heard, server: GrpcServer, port: int) -> None:
        self.index, self.heard, self.server, self.port = index, heard, server, port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub = pb_grpc.KvIndexStub(self.channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def run(*, in_order: bool) -> AsyncIterator[Running]:
    index, heard = KnownAnswers(), Heard()
    server = GrpcServer(index, heard, GrpcOptions(keys_max=KEYS_MAX, in_order=in_order))
    running = Running(index, heard, server, await server.start("127.0.0.1", 0))
    yield running
    await running.channel.close()
    await server.stop(0)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with run(in_order=False) as running:
        yield running


@pytest.fixture(params=[False, True], ids=["at once", "in order"])
async def streamed(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    async with run(in_order=request.param) as running:
        yield running


async def test_a_lookup_reaches_the_index_and_its_answer_the_router(running: Running) -> None:
    keys = [0, 1, KEY_MASK]
    request = wire.match_request("m", {PROFILE: keys, "other": []}, [FIRST])
    answer = wire.match_answer(await running.stub.Match(request))
    assert running.index.asked == [("m", {PROFILE: keys, "other": []}, (FIRST,))]
    assert answer == await KnownAnswers().match("m", {})
    assert not running.index.estimated
    await running.stub.Match(wire.match_request("m", {PROFILE: keys}, estimate=True))
    assert running.index.estimated


PROMPT = pb.PromptKeys(profile=PROFILE, keys=bytes(8))


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (pb.MatchRequest(prompts=[PROMPT]), "INVALID_ARGUMENT", "model: not given"),
        (pb.MatchRequest(model="m"), "INVALID_ARGUMENT", "prompts: none given"),
        (pb.MatchRequest(model="m", prompts=[PROMPT, pb.PromptKeys()]), "INVALID_ARGUMENT", "prompts[1].profile: "),
        (
            pb.MatchRequest(model="m", prompts=[pb.PromptKeys(profile="p", keys=bytes(9))]),
            "INVALID_ARGUMENT",
            "prompts[0].keys: 9 bytes",
        ),
        (
            pb.MatchRequest(model="m", prompts=[PROMPT], engines=["nonsense"]),
            "INVALID_ARGUMENT",
            "engines: engine 'non",
        ),
        (pb.MatchRequest(model="who?", prompts=[PROMPT]), "NOT_FOUND", "model: no engine serves 'who?'"),
        (
            pb.MatchRequest(model="m", prompts=[pb.PromptKeys(profile="p", keys=bytes(8 * KEYS_MAX + 8))]),
            "RESOURCE_EXHAUSTED",
            f"of {KEYS_MAX} keys each",
        ),
        (
            pb.MatchRequest(model="m", prompts=[PROMPT] * (PROFILES_MAX + 1)),
            "RESOURCE_EXHAUSTED",
            f"at most {PROFILES_MAX} hash profiles",
        ),
        (pb.MatchRequest(model="m" * (1 << 22), prompts=[PROMPT]), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_answered_is_told_why(
    running: Running, request_: pb.MatchRequest, code: str, said: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await running.stub.Match(request_)
    assert refusal.value.code() is grpc.StatusCode[code]
    assert said in (refusal.value.details() or "")
    assert running.index.asked == []


class Streaming:
    """A stream of lookups."""

    def __init__(self, running: Running) -> None:
        self.call = running.stub.MatchStream()

    async def ask(self, number: int, request: pb.MatchRequest) -> None:
        await self.call.write(pb.StreamedMatch(id=number, request=request))

    async def answer(self) -> pb.StreamedMatchAnswer:
        async with asyncio.timeout(DEADLINE_S):
            answer: pb.StreamedMatchAnswer = await self.call.read()
            return answer


async def test_lookups_over_a_stream_are_answered_as_calls_are(running: Running) -> None:
    streaming, request = Streaming(running), wire.match_request("m", {PROFILE: [1, 2]}, [FIRST])
    await streaming.ask(7, request)
    answer = await streaming.answer()
    assert (answer.id, answer.response) == (7, await running.stub.Match(request))
    await streaming.ask(8, wire.match_request("who?", {PROFILE: [1]}))
    await streaming.ask(9, pb.MatchRequest(model="m", prompts=[PROMPT] * (PROFILES_MAX + 1)))
    refused = {answer.id: answer.refusal for answer in [await streaming.answer(), await streaming.answer()]}
    assert refused[8] == pb.Refusal(code=5, details="model: no engine serves 'who?'")
    assert refused[9].code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    streaming.call.cancel()


async def test_a_lookup_does_not_wait_for_the_one_before(running: Running) -> None:
    streaming = Streaming(running)
    running.index.may_answer.clear()
    await streaming.ask(1, wire.match_request("m", {PROFILE: [1]}))
    await streaming.ask(2, wire.match_request("who?", {PROFILE: [1]}))
    assert (await streaming.answer()).id == 2
    running.index.may_answer.set()
    assert (await streaming.answer()).id == 1
    streaming.call.cancel()


async def test_in_order_a_lookup_waits_for_the_one_before() -> None:
    async with run(in_order=True) as running:
        streaming = Streaming(running)
        running.index.may_answer.clear()
        await streaming.ask(1, wire.match_request("m", {PROFILE: [1]}))
        await streaming.ask(2, wire.match_request("who?", {PROFILE: [1]}))
        running.index.may_answer.set()
        assert [(await streaming.answer()).id for _ in range(2)] == [1, 2]
        streaming.call.cancel()


async def test_a_defect_costs_its_lookup_and_not_the_stream(
    streamed: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    streaming = Streaming(streamed)

    async def broken(*_: object, **__: object) -> MatchAnswer:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(streamed.index, "match", broken)
        await streaming.ask(1, wire.match_request("m", {PROFILE: [1]}))
        assert (await streaming.answer()).refusal.code == grpc.StatusCode.UNKNOWN.value[0]
    assert "a lookup failed" in caplog.text
    await streaming.ask(2, wire.match_request("m", {PROFILE: [1]}))
    assert (await streaming.answer()).HasField("response")
    streaming.call.cancel()


async def test_who_leaves_before_the_answer_disturbs_nobody(
    streamed: Running, caplog: pytest.LogCaptureFixture
) -> None:
    streaming, request = Streaming(streamed), wire.match_request("m", {PROFILE: [1]})
    streamed.index.may_answer.clear()
    await streaming.ask(1, request)
    async with asyncio.timeout(DEADLINE_S):
        await streamed.index.being_asked.wait()
    streaming.call.cancel()
    streamed.index.may_answer.set()
    async with asyncio.timeout(DEADLINE_S):
        await streamed.stub.Match(request)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_drain_answers_what_a_stream_has_asked_and_ends_it(streamed: Running) -> None:
    streaming = Streaming(streamed)
    streamed.index.may_answer.clear()
    await streaming.ask(1, wire.match_request("m", {PROFILE: [1]}))
    async with asyncio.timeout(DEADLINE_S):
        await streamed.index.being_asked.wait()
    stopping = asyncio.create_task(streamed.server.stop(DEADLINE_S))
    await asyncio.sleep(0)
    streamed.index.may_answer.set()
    assert (await streaming.answer()).id == 1
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await streaming.call.read()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping


async def test_a_lookup_of_the_largest_size_is_answered(running: Running) -> None:
    prompts = {f"profile {n}": range(KEYS_MAX) for n in range(PROFILES_MAX)}
    await running.stub.Match(wire.match_request("m", prompts))
    assert running.index.asked[0][1] == {name: list(keys) for name, keys in prompts.items()}


async def test_the_fleet_comes_as_it_changes(running: Running) -> None:
    view = EngineView(FIRST, "http://10.0.0.1:8000", health=Health.READY, sync=Sync.INEXACT, inexact_reason="a gap")
    deltas = [FleetDelta(snapshot=True, changed=(view,)), FleetDelta(snapshot=False, removed=(FIRST, SECOND))]
    load = Load(3, 1, 0.5, 1_700_000_000.0, frozenset({"sql"}), InFlight(1, 700, 2))
    deltas.append(FleetDelta(snapshot=False, loads=((FIRST, load),)))
    for delta in deltas:
        running.index.deltas.put_nowait(delta)
    watch = running.stub.WatchFleet(pb.WatchFleetRequest(router="r1"))
    async with asyncio.timeout(DEADLINE_S):
        updates = [await watch.read() for _ in deltas]
    assert [(u.snapshot, [wire.engine_view(e) for e in u.engines], list(u.removed)) for u in updates] == [
        (True, [view], []),
        (False, [], [str(FIRST), str(SECOND)]),
        (False, [], []),
    ]
    assert [wire.engine_load(message, 0.0) for message in updates[2].loads] == [(FIRST, load)]
    assert running.index.watched_by == ["r1"]
    watch.cancel()
    async with asyncio.timeout(DEADLINE_S):
        await running.index.watch_closed.wait()  # the index hears that nobody watches any more


async def test_observations_are_handed_on_and_the_odd_one_skipped(running: Running) -> None:
    about = ("r-1", FIRST, "m")
    observations: list[Observation] = [
        Routed(*about, 100, 64, {PROFILE: (1, 2, KEY_MASK)}),
        FirstToken(*about, 0.25),
        Finished(*about, None, 12, False, Outcome.CUT),
    ]
    messages = [wire.observation_message(o) for o in observations]
    odd = pb.Observation(request_id="r-2", engine=str(FIRST), finished=pb.Finished(outcome="a word of tomorrow"))
    sent = iter([messages[0], odd, pb.Observation(), *messages[1:]])
    summary = await running.stub.Observe(sent, metadata=((ROUTER_METADATA, "r1"),))
    assert running.heard.observations == observations
    assert running.heard.routers == [("joined", "r1"), ("left", "r1")]
    assert summary.received == 5
    assert (running.server.observed.received, running.server.observed.refused) == (5, 2)


async def test_several_observations_in_one_message_are_read_in_their_order(running: Running) -> None:
    observations: list[Observation] = [FirstToken(f"r-{n}", FIRST, "m", 0.25) for n in range(5)]
    one, two, *others = map(wire.observation_message, observations)
    two.also.extend(others)
    call = running.stub.Observe(iter([one, two]))
    assert ("kvatlas-reports", "many") in map(tuple, await call.initial_metadata())
    assert (await call).received == 5
    assert running.heard.observations == observations


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_tells_of_the_drain(running: Running, service: str) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service=service))
    async with asyncio.timeout(DEADLINE_S):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(running.server.stop(1.0))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await stopping


async def test_reflection_lists_the_service(running: Running) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(running.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    reply = await call.read()
    call.cancel()
    assert SERVICE in [s.name for s in reply.list_services_response.service]


async def test_a_drain_ends_endless_streams_at_once_and_answers_lookups(running: Running) -> None:
    running.index.deltas.put_nowait(FleetDelta(snapshot=True))
    watch = running.stub.WatchFleet(pb.WatchFleetRequest())
    await watch.read()
    observe = running.stub.Observe()
    await observe.write(wire.observation_message(FirstToken("r", FIRST, "m", 0.1)))
    running.index.may_answer.clear()
    lookup = asyncio.ensure_future(running.stub.Match(wire.match_request("m", {PROFILE: [1]})))
    async with asyncio.timeout(DEADLINE_S):
        await running.index.being_asked.wait()
    stopping = asyncio.create_task(running.server.stop(DEADLINE_S))
    async with asyncio.timeout(DEADLINE_S / 2):
        for call in (watch.read(), observe):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        running.index.may_answer.set()
        assert wire.match_answer(await lookup) == await KnownAnswers().match("m", {})
        await stopping
        await running.index.watch_closed.wait()


async def test_a_port_in_use_is_named_with_the_cure(running: Running) -> None:
    second = GrpcServer(running.index, running.heard)
    with pytest.raises(AddressUnavailable, match=rf"gRPC on 127\.0\.0\.1:{running.port}: .*in use.*--grpc-listen"):
        await second.start("127.0.0.1", running.port)
    await second.stop(0)


async def test_the_port_given_is_the_port_served() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    server = GrpcServer(KnownAnswers(), Heard())
    assert await server.start("127.0.0.1", port) == port
    await server.stop(0)
