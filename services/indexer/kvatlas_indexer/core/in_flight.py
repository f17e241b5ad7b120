"""What all routers have in flight at each engine, from what they report; told to a router without its own part.

A router begins every stream with the requests it has in flight. So a new stream is a clean slate for its router, and a
shard that has just started, or missed something, is right again with it. The requests of a router whose streams have
all ended are kept for a grace, in which it may connect again. A report that is lost leaves a request behind: it is
given up when it is too old, or when there are too many (the oldest first). An answer that does not stream shows its
first token with its last: such a request counts as decoding when its first token was expected.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush

from kvatlas_common.fleet import Head, InFlight
from kvatlas_common.observations import Finished, FirstToken, Observation, Routed
from kvatlas_common.words import EngineId


@dataclass(frozen=True, slots=True)
class InFlightLimits:
    requests_max: int = 65_536
    request_age_max_s: float = 900.0  # longer than nearly all answers take
    router_grace_s: float = 5.0
    routers_max: int = 1024  # streams of more are listened to, and their requests not counted


@dataclass(slots=True, eq=False)
class _Request:
    router: str
    engine: EngineId
    tokens: int  # to be computed before its first token
    since: float
    decoding: bool = False


@dataclass(slots=True)
class _Sum:
    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0

    def add(self, request: _Request, sign: int) -> None:
        if request.decoding:
            self.decoding += sign
        else:
            self.prefilling += sign
            self.prefill_tokens += sign * request.tokens


@dataclass(slots=True)
class _Queue:
    """One engine's requests without a first token, of all routers, the oldest first; `since` when that is the first."""

    waiting: dict[_Request, None]
    since: float


@dataclass(slots=True)
class _Router:
    streams: int = 0
    left_at: float = 0.0  # where there are no streams


class InFlightBook:
    """Not thread-safe. `now` in seconds of any one clock."""

    def __init__(self, limits: InFlightLimits | None = None) -> None:
        self._limits = limits or InFlightLimits()
        self._requests: OrderedDict[tuple[str, str], _Request] = OrderedDict()  # by router and id, the oldest first
        self._sums: dict[EngineId, dict[str, _Sum]] = {}  # by engine and router; no entry is all zero
        self._queues: dict[EngineId, _Queue] = {}  # none is empty
        self._now = float("-inf")  # of what happened last
        self._routers: dict[str, _Router] = {}
        self._silent: list[tuple[float, int, tuple[str, str], _Request]] = []  # by when they are taken to decode
        self._count = 0
        self._changed: set[EngineId] = set()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def routers(self) -> int:
        """How many are connected, or may be again."""
        return len(self._routers)

    def others(self, engine: EngineId, router: str) -> InFlight:
        """What routers other than this one have in flight there."""
        sums = [s for name, s in self._sums.get(engine, {}).items() if name != router]
        if not sums:
            return InFlight()
        return InFlight(
            sum(s.prefilling for s in sums), sum(s.prefill_tokens for s in sums), sum(s.decoding for s in sums)
        )

    def head(self, engine: EngineId, router: str) -> Head:
        """What the engine is computing, as this router is to be told."""
        queue = self._queues.get(engine)
        if queue is None:
            return Head()
        oldest = next(iter(queue.waiting))
        return Head(0 if oldest.router == router else oldest.tokens, queue.since)

    def take_changed(self) -> set[EngineId]:
        """Engines of which `others` may be different than when this was last called."""
        changed, self._changed = self._changed, set()
        return changed

    # -- what happens --------------------------------------------------------------------------------------------------

    def joined(self, router: str) -> None:
        """A stream of reports begins."""
        if router not in self._routers and len(self._routers) >= self._limits.routers_max:
            return
        self._routers.setdefault(router, _Router()).streams += 1
        self._forget(router)

    def left(self, router: str, now: float) -> None:
        """One of its streams has ended."""
        self._now = now
        if (known := self._routers.get(router)) is not None:
            known.streams = max(known.streams - 1, 0)
            known.left_at = now

    def observe(self, router: str, observation: Observation, now: float) -> None:
        self._now = now
        if router not in self._routers:
            return
        at = (router, observation.request_id)
        match observation:
            case Routed():
                self._end(at)  # it is tried again, maybe on another engine
                if len(self._requests) >= self._limits.requests_max:
                    self._end(next(iter(self._requests)))
                tokens = observation.to_compute
                if tokens is None:
                    tokens = max(observation.prompt_tokens - observation.predicted_cached_tokens, 0)
                request = self._requests[at] = _Request(router, observation.engine, tokens, now)
                self._add(request, 1)
                self._queues.setdefault(request.engine, _Queue({}, now)).waiting[request] = None
                if observation.silent_s:
                    self._count += 1
                    heappush(self._silent, (now + observation.silent_s, self._count, at, request))
            case FirstToken():
                begun = self._requests.get(at)
                if begun is not None and begun.engine == observation.engine:
                    self._decodes(begun)
            case Finished():
                self._end(at)

    def on_tick(self, now: float) -> None:
        """Now and then: what is too old goes, and routers that have not come back."""
        self._now, limits = now, self._limits
        while self._silent and self._silent[0][0] <= now:
            *_, at, request = heappop(self._silent)
            if self._requests.get(at) is request:
                self._decodes(request)
        while self._requests:
            oldest = next(iter(self._requests))
            if now - self._requests[oldest].since <= limits.request_age_max_s:
                break
            self._end(oldest)
        gone = [name for name, r in self._routers.items() if not r.streams and now - r.left_at > limits.router_grace_s]
        for router in gone:
            self._forget(router)
            del self._routers[router]

    # -- within --------------------------------------------------------------------------------------------------------

    def _forget(self, router: str) -> None:
        for at in [at for at in self._requests if at[0] == router]:
            self._end(at)

    def _decodes(self, request: _Request) -> None:
        if not request.decoding:
            self._add(request, -1)
            request.decoding = True
            self._add(request, 1)
            self._leave_queue(request)

    def _end(self, at: tuple[str, str]) -> None:
        if (request := self._requests.pop(at, None)) is not None:
            self._add(request, -1)
            if not request.decoding:
                self._leave_queue(request)

    def _leave_queue(self, request: _Request) -> None:
        queue = self._queues[request.engine]
        oldest = next(iter(queue.waiting)) is request
        del queue.waiting[request]
        if not queue.waiting:
            del self._queues[request.engine]
        elif oldest:
            queue.since = self._now

    def _add(self, request: _Request, sign: int) -> None:
        sums = self._sums.setdefault(request.engine, {})
        added = sums.setdefault(request.router, _Sum())
        added.add(request, sign)
        if added == _Sum():
            del sums[request.router]
            if not sums:
                del self._sums[request.engine]
        self._changed.add(request.engine)
