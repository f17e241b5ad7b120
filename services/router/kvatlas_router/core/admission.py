"""Who may be sent on, who waits, and who is turned away when every engine of a model is saturated.

A request that finds a place is sent on at once. Else it waits in its line, first come, first served; only when
a place frees does it get an engine, chosen by what is known then. The queue is bounded in length and in time: when it
is full, or a request has waited for `deadline_s`, the client is told when to try again, by how fast the queue moves.

A place that was given is taken until its request was sent (from then on the engine's own figures show it) or came to
nothing. Lines may share engines (adapters do): a place that frees goes to the request that came first among all that
could use it. Which engine a place is at is the choice's to say: a request may go where one of another line, still being
decided, has no other engine to go to. There may then be as many too many as are being decided at that moment. Where no
engine is left to wait for, all go on and are told so by the choice.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from kvatlas_common.words import EngineId

PACE_GRANTS = 64  # the pace of a queue is that of its last grants
RETRY_MIN_S = 1
RETRY_MAX_S = 120


class Line(NamedTuple):
    """Requests that may go to the same engines wait in one queue: those that serve the model and have the labels."""

    model: str
    labels: tuple[tuple[str, str], ...] = ()


_ANY = Line("")
Free = Callable[[EngineId], int]
Serving = Callable[[Line], Sequence[EngineId]]


class Cause(StrEnum):
    """Why a request was turned away."""

    FULL = "full"
    DEADLINE = "deadline"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """`queue_max` requests wait per line; 0: none waits."""

    queue_max: int = 1024
    deadline_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Shed:
    cause: Cause
    waiting: int  # requests that wait in its line
    retry_after_s: int


class Place:
    """The right to send one request, released once. Without arguments: for a request that needs none."""

    __slots__ = ("_released", "line")

    def __init__(self, line: Line = _ANY, released: Callable[[Line], None] | None = None) -> None:
        self.line = line
        self._released = released

    def release(self) -> None:
        if self._released is not None:
            released, self._released = self._released, None
            released(self.line)


@dataclass(slots=True, eq=False)
class Waiter:
    """`place`: given when its turn has come."""

    line: Line
    number: int  # in order of arrival, over all models
    came_at: float
    deadline: float
    place: Place | None = None


@dataclass(slots=True)
class _Queue:
    since: float  # not empty since
    waiters: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)
    grants: deque[float] = field(default_factory=lambda: deque(maxlen=PACE_GRANTS))

    @property
    def head(self) -> int:
        return next(iter(self.waiters))


class Admission:
    """Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, rules: AdmissionRules = AdmissionRules()) -> None:
        self.rules: Final = rules
        self._queues: dict[Line, _Queue] = {}
        self._unsent: Counter[Line] = Counter()
        self._count = 0

    @property
    def waiting(self) -> int:
        return sum(len(q.waiters) for q in self._queues.values())

    @property
    def idle(self) -> bool:
        """Nobody waits."""
        return not self._queues

    def ask(self, line: Line, engines: Iterable[EngineId], free: Free, now: float) -> Place | Waiter | Shed:
        """`free`: how many more requests an engine should be sent. After a `Waiter`, `pump` may find it a place."""
        if not self._queues and self._has_room(engines, free):
            return self._give(line)
        queue = self._queues.get(line)
        if (len(queue.waiters) if queue else 0) >= self.rules.queue_max:
            return self._shed(line, Cause.FULL, now)
        if queue is None:
            queue = self._queues[line] = _Queue(now)
        self._count += 1
        waiter = Waiter(line, self._count, now, now + self.rules.deadline_s)
        queue.waiters[waiter.number] = waiter
        return waiter

    def pump(self, serving: Serving, free: Free, now: float) -> list[Waiter]:
        """The waiters whose turn has come, with their places, in order of arrival."""
        called: list[Waiter] = []
        if self._queues:
            rooms = _Rooms(serving, free)
            for line, count in sorted(self._unsent.items(), key=lambda unsent: len(rooms.engines(unsent[0]))):
                rooms.take(line, count)  # those that have the fewest engines to go to first
            heads = {q.head: m for m, q in self._queues.items()}
            while heads:
                line = heads.pop(min(heads))
                if rooms.take(line, 1) or not rooms.engines(line):
                    called.append(self._call_first(line, now))
                    if line in self._queues:
                        heads[self._queues[line].head] = line
        return called

    def leave(self, waiter: Waiter) -> None:
        """It does not want a place any more; one that it was given is free again."""
        if waiter.place is not None:
            waiter.place.release()
        else:
            self._remove(waiter)

    def give_up(self, waiter: Waiter, cause: Cause, now: float) -> Shed:
        """For one that waits: its deadline has passed, or the router goes."""
        shed = self._shed(waiter.line, cause, now)
        self._remove(waiter)
        return shed

    def due(self, now: float) -> list[Waiter]:
        """Those whose deadline has passed, to be given up."""
        late: list[Waiter] = []
        for queue in self._queues.values():
            for waiter in queue.waiters.values():
                if waiter.deadline > now:
                    break
                late.append(waiter)
        return late

    def waiters(self) -> list[Waiter]:
        return [w for q in self._queues.values() for w in q.waiters.values()]

    def _has_room(self, engines: Iterable[EngineId], free: Free) -> bool:
        """Stops at the first engine where that is clear; an unsent request may go to any engine."""
        unsent = self._unsent.total()
        room, any_engine = 0, False
        for engine in engines:
            any_engine = True
            room += free(engine)
            if room > unsent:
                return True
        return not any_engine

    def _give(self, line: Line) -> Place:
        self._unsent[line] += 1
        return Place(line, self._released)

    def _released(self, line: Line) -> None:
        self._unsent[line] -= 1
        if not self._unsent[line]:
            del self._unsent[line]

    def _call_first(self, line: Line, now: float) -> Waiter:
        queue = self._queues[line]
        _, waiter = queue.waiters.popitem(last=False)
        queue.grants.append(now)
        if not queue.waiters:
            del self._queues[line]
        waiter.place = self._give(line)
        return waiter

    def _remove(self, waiter: Waiter) -> None:
        queue = self._queues.get(waiter.line)
        if queue is not None:
            queue.waiters.pop(waiter.number, None)
            if not queue.waiters:
                del self._queues[waiter.line]

    def _shed(self, line: Line, cause: Cause, now: float) -> Shed:
        queue = self._queues.get(line)
        if queue is None:
            return Shed(cause, 0, RETRY_MIN_S)
        waiting = len(queue.waiters)
        began = queue.grants[0] if len(queue.grants) == PACE_GRANTS else queue.since
        passed = now - began
        wait_s = passed * (waiting + 1) / len(queue.grants) if queue.grants else self.rules.deadline_s
        return Shed(cause, waiting, min(max(math.ceil(wait_s), RETRY_MIN_S), RETRY_MAX_S))


class _Rooms:
    """The places of one look at the engines, as they are given away."""

    def __init__(self, serving: Serving, free: Free) -> None:
        self._serving = serving
        self._free = free
        self._engines: dict[Line, Sequence[EngineId]] = {}
        self._left: dict[EngineId, int] = {}

    def engines(self, line: Line) -> Sequence[EngineId]:
        if line not in self._engines:
            self._engines[line] = engines = self._serving(line)
            for engine in engines:
                if engine not in self._left:
                    self._left[engine] = self._free(engine)
        return self._engines[line]

    def take(self, line: Line, count: int) -> bool:
        """From the engines with most places first. False: there were not that many."""
        left = self._left
        for engine in sorted(self.engines(line), key=lambda e: -left[e]):
            taken = min(left[engine], count)
            left[engine] -= taken
            count -= taken
            if not count:
                return True
        return False
