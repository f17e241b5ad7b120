"""A router's lookups at one shard, all over one stream: a call for each would cost gRPC three times as much.

The stream is *up* once the shard has answered its opening; until then, and with a shard of a version that has no such
stream, lookups are calls of their own.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio

from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_router.adapters import background

log = logging.getLogger(__name__)

ASKED_MAX = 1024  # lookups that the shard has not taken in yet
_RECONNECT_S = (0.1, 0.5)
_NOT_THERE_S = 60.0  # after a shard has said that it has no such stream
CALL_IS_OVER = (grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""What writing to a call then raises."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Refused(Exception):
    """What a call would have ended with."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class MatchStream:
    """`run` keeps it open for as long as it is not cancelled. `stub`: of the shard's channel."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._number = 0
        self._asked: asyncio.Queue[pb.StreamedMatch] | None = None  # what is to be sent; None: it is not up
        self._waiting: dict[int, asyncio.Future[pb.StreamedMatchAnswer]] = {}

    @property
    def up(self) -> bool:
        return self._asked is not None

    async def match(self, request: pb.MatchRequest, timeout_s: float) -> pb.MatchResponse:
        """While it is up. Raises `Refused`, also if the stream is lost or time is over."""
        assert self._asked is not None
        self._number = number = self._number + 1
        answered: asyncio.Future[pb.StreamedMatchAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        try:
            self._asked.put_nowait(pb.StreamedMatch(id=number, request=request))
            async with asyncio.timeout(timeout_s):
                answer = await answered
        except asyncio.QueueFull:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"{ASKED_MAX} lookups wait to be sent") from None
        except TimeoutError:
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {timeout_s:g} s") from None
        finally:
            del self._waiting[number]
        if answer.HasField("refusal"):
            refusal = answer.refusal
            raise Refused(_CODES.get(refusal.code, grpc.StatusCode.UNKNOWN), refusal.details)
        response: pb.MatchResponse = answer.response
        return response

    async def run(self) -> None:
        shortest, longest = _RECONNECT_S
        pause = shortest
        while True:
            try:
                await self._answers()
                pause = shortest
            except grpc.aio.AioRpcError as error:
                not_there = error.code() is grpc.StatusCode.UNIMPLEMENTED
                pause = _NOT_THERE_S if not_there else shortest if self.up else min(pause * 2, longest)
            except Exception:  # a defect here or in grpc must not end the stream for good
                log.exception("the stream of lookups failed")
                pause = longest
            finally:
                self._lost()
            await asyncio.sleep(pause)

    async def _answers(self) -> None:
        asked: asyncio.Queue[pb.StreamedMatch] = asyncio.Queue(ASKED_MAX)
        call = self._stub.MatchStream()
        asking = background.start(_ask(call, asked), "asking for matches")
        try:
            await call.initial_metadata()
            if not call.done():
                self._asked = asked
            async for answer in call:
                waiting = self._waiting.get(answer.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            call.cancel()
            await background.stop(asking)

    def _lost(self) -> None:
        self._asked = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Refused(grpc.StatusCode.UNAVAILABLE, "the stream of lookups was lost"))


async def _ask(call: Any, asked: asyncio.Queue[pb.StreamedMatch]) -> None:
    """Until the call is over. Given an iterator, gRPC would wait for more of it even then."""
    while True:
        request = await asked.get()
        try:
            await call.write(request)
        except CALL_IS_OVER:
            return
        except Exception:  # a defect here or in grpc must not keep the others from being asked
            log.exception("a lookup cannot be sent")
