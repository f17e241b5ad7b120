"""Reports on their way to one indexer, as few messages as may be: one takes gRPC as long as many reports together do.

That a request was sent somewhere is told at once, because other routers choose by it; what else there is to tell goes
with it, or with whatever else comes, or by itself after `WAITS_S`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb

QUEUED_MAX = 4096  # the newest is dropped and counted when full
WAITS_S = 0.003
"""Other routers choose by it, too: that a prompt is computed, they should know within 5 ms."""
TOGETHER_MAX = 64
TOGETHER_BYTES_MAX = 256 * 1024


class Outbox:
    """For one event loop, and one who takes."""

    def __init__(self, dropped: Callable[[], None]) -> None:
        self.many = False  # whether the indexer reads several reports in one message
        self._dropped = dropped
        self._reports: deque[pb.Observation] = deque()
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, report: pb.Observation) -> None:
        if len(self._reports) >= QUEUED_MAX:
            self._dropped()
            return
        self._reports.append(report)
        if report.HasField("routed"):
            self._are_due()
        elif self._timer is None and not self._due.is_set():
            self._timer = asyncio.get_running_loop().call_later(WAITS_S, self._are_due)

    async def take(self) -> pb.Observation:
        """One message, with all that is to be told by now where the indexer reads it."""
        await self._due.wait()
        message = self._reports.popleft()
        if self.many and self._reports:
            message = self._together(message)
        if not self._reports:
            self._due.clear()
        return message

    def put_back(self, message: pb.Observation) -> None:
        """One that was taken and could not be told: the next that is taken."""
        also = list(message.also)
        del message.also[:]
        self._reports.extendleft(reversed([message, *also]))
        self._due.set()

    def _together(self, first: pb.Observation) -> pb.Observation:
        message = pb.Observation()
        message.CopyFrom(first)  # it is kept elsewhere too
        size = first.ByteSize()
        while self._reports and len(message.also) < TOGETHER_MAX:
            size += self._reports[0].ByteSize()
            if size > TOGETHER_BYTES_MAX:
                break
            message.also.append(self._reports.popleft())
        return message

    def _are_due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reports:
            self._due.set()
