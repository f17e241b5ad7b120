"""Lookups over gRPC: one a call, or all of a router's over one stream, which costs gRPC a third."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from kvatlas_common import wire
from kvatlas_common.matching import MatchAnswer, PromptKeys
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import Index, IndexUnavailable, UnknownModel

log = logging.getLogger(__name__)

PROFILES_MAX = 16
AT_ONCE_MAX = 256  # of one stream; more are not read before one is answered

_DEFECT = pb.Refusal(code=grpc.StatusCode.UNKNOWN.value[0], details="an error of the indexer's own; its log has more")
Context = grpc.aio.ServicerContext[object, object]


class _Refused(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Matches:
    """`keys_max`: of one prompt. `in_order`: a stream's lookups are answered one after the other, not at once. When
    `draining` is set streams end, once what they were asked is answered. `too_late` is called for an answer over a
    stream that has ended.
    """

    def __init__(
        self,
        index: Index,
        keys_max: int,
        draining: asyncio.Event,
        too_late: Callable[[], None] = lambda: None,
        *,
        in_order: bool = False,
    ) -> None:
        self._index = index
        self._keys_max = keys_max
        self._in_order = in_order
        self._draining = draining
        self._too_late = too_late

    async def one(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        try:
            return wire.match_response(await self._answer(request), plain=request.reads_plain)
        except _Refused as refused:
            await context.abort(refused.code, refused.details)

    async def stream(self, requests: AsyncIterator[pb.StreamedMatch], context: Context) -> None:
        await context.send_initial_metadata(())
        answering: set[asyncio.Task[None]] = set()
        writing = asyncio.Lock()
        reading = asyncio.create_task(self._read(requests, context, answering, writing))
        drained = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((reading, drained), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                if answering:
                    await asyncio.wait(answering)
                async with writing:  # an answer on its way is not cut off
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "this indexer is shutting down")
            await reading
            if answering:
                await asyncio.wait(answering)
        finally:
            for task in (reading, drained, *answering):
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.StreamedMatch],
        context: Context,
        answering: set[asyncio.Task[None]],
        writing: asyncio.Lock,
    ) -> None:
        async for asked in requests:
            if self._in_order:
                async with writing:
                    await self._write(await self._answered(asked), context)
                continue
            task = asyncio.create_task(self._answer_one(asked, context, writing))
            answering.add(task)
            task.add_done_callback(answering.discard)
            if len(answering) >= AT_ONCE_MAX:
                await asyncio.wait(answering, return_when=asyncio.FIRST_COMPLETED)

    async def _answer_one(self, asked: pb.StreamedMatch, context: Context, writing: asyncio.Lock) -> None:
        answer = await self._answered(asked)
        async with writing:
            await self._write(answer, context)

    async def _answered(self, asked: pb.StreamedMatch) -> pb.StreamedMatchAnswer:
        try:
            found = await self._answer(asked.request)
        except _Refused as refused:
            number: int = refused.code.value[0]
            return pb.StreamedMatchAnswer(id=asked.id, refusal=pb.Refusal(code=number, details=refused.details))
        except Exception:  # as of a call of its own
            log.exception("a lookup failed")
            return pb.StreamedMatchAnswer(id=asked.id, refusal=_DEFECT)
        answer = pb.StreamedMatchAnswer(id=asked.id, response=pb.MatchResponse())
        wire.write_match_response(found, answer.response, plain=asked.request.reads_plain)
        return answer

    async def _write(self, answer: pb.StreamedMatchAnswer, context: Context) -> None:
        try:
            await context.write(answer)
        except Exception:  # who asked is gone; gRPC does not export all that it raises then
            self._too_late()

    async def _answer(self, request: pb.MatchRequest) -> MatchAnswer:
        """Raises `_Refused`."""
        if len(request.prompts) > PROFILES_MAX or any(len(p.keys) > self._keys_max * 8 for p in request.prompts):
            limits = f"at most {PROFILES_MAX} hash profiles of {self._keys_max} keys each"
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"prompts: {limits}")
        try:
            model, prompts, engines = _lookup(request)
        except ValueError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        try:
            return await self._index.match(model, prompts, engines, estimate=request.estimate)
        except UnknownModel:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"model: no engine serves {model!r}") from None
        except IndexUnavailable as error:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, str(error)) from None


def _lookup(request: pb.MatchRequest) -> tuple[str, dict[str, PromptKeys], tuple[EngineId, ...]]:
    """Raises `ValueError` that names the field."""
    if not request.model:
        raise ValueError("model: not given")
    if not request.prompts:
        raise ValueError("prompts: none given")
    prompts: dict[str, PromptKeys] = {}
    for number, prompt in enumerate(request.prompts):
        if not prompt.profile:
            raise ValueError(f"prompts[{number}].profile: not given")
        try:
            prompts[prompt.profile] = wire.unpack_keys(prompt.keys)
        except ValueError as error:
            raise ValueError(f"prompts[{number}].{error}") from error
    try:
        engines = tuple(EngineId.parse(engine) for engine in request.engines)
    except ValueError as error:
        raise ValueError(f"engines: {error}") from error
    return request.model, prompts, engines
