"""An indexer that answers what a test says, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.observations import Observation
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.proto.kvatlas.v1 import index_pb2_grpc as rpc
from kvatlas_common.wire import engine_message, match_response, observation
from kvatlas_common.words import EngineId, Medium

Matching = Callable[[pb.MatchRequest], Awaitable[MatchAnswer]]
PROFILE = "sha256_cbor/b16/tagged/seed=42"


def ready(address: str, **also: Any) -> EngineView:
    """An engine as an indexer that knows it well tells of it."""
    known: dict[str, Any] = {
        "models": frozenset({"tiny"}),
        "health": Health.READY,
        "profile": PROFILE,
        "block_size": 16,
    }
    return EngineView(EngineId.parse(address), f"http://{address}", **(known | also))


def saying(*matches: tuple[str, int], unknown: Iterable[str] = ()) -> Matching:
    """Every lookup is answered with these engines and their leading blocks."""

    async def match(_: pb.MatchRequest) -> MatchAnswer:
        return MatchAnswer(
            tuple(EngineMatch(EngineId.parse(e), n, {Medium.GPU: n}, True) for e, n in matches),
            tuple(map(EngineId.parse, unknown)),
        )

    return match


async def never(_: pb.MatchRequest) -> MatchAnswer:
    await asyncio.Event().wait()
    raise AssertionError


@dataclass
class ScriptedIndexer(rpc.KvIndexServicer):
    """`tell` changes the fleet; `asked` and `observed` are what routers sent. It can be stopped and started again."""

    views: tuple[EngineView, ...] = ()
    match: Matching = field(default_factory=saying)
    asked: list[pb.MatchRequest] = field(default_factory=list)
    observed: list[Observation] = field(default_factory=list)
    port: int = 0
    streams: bool = True  # whether it has the stream of lookups
    streamed: int = 0  # how many of them it was asked for
    _server: grpc.aio.Server | None = None
    _told: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        rpc.add_KvIndexServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def tell(self, *views: EngineView) -> None:
        async with self._told:
            self.views = views
            self._told.notify_all()

    async def MatchStream(self, stream: AsyncIterator[pb.StreamedMatch], context: Any) -> None:
        if not self.streams:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "of an earlier version")
        await context.send_initial_metadata(())
        self.streamed += 1
        answering = set()

        async def answer(asked: pb.StreamedMatch) -> None:
            try:
                response = await self.Match(asked.request, None)
                await context.write(pb.StreamedMatchAnswer(id=asked.id, response=response))
            except ValueError as error:
                await context.write(pb.StreamedMatchAnswer(id=asked.id, refusal=pb.Refusal(code=2, details=str(error))))

        async for asked in stream:
            answering.add(asyncio.create_task(answer(asked)))

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchResponse:
        self.asked.append(request)
        return match_response(await self.match(request))

    async def WatchFleet(self, request: pb.WatchFleetRequest, context: Any) -> AsyncIterator[pb.FleetUpdate]:
        while True:
            yield pb.FleetUpdate(snapshot=True, engines=map(engine_message, self.views))
            async with self._told:
                await self._told.wait()

    async def Observe(self, stream: AsyncIterator[pb.Observation], context: Any) -> pb.ObserveSummary:
        async for message in stream:
            self.observed.append(observation(message))
        return pb.ObserveSummary(received=len(self.observed))
