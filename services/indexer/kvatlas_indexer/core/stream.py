"""Order: one engine's messages, as they come, to batches applied once each and in sequence.

Sequence numbers start at 0 with each life of the engine's publisher (an *epoch*) and rise by one. What can go wrong,
and what follows:

| seen                                                  | means       | done                                        |
|-------------------------------------------------------|-------------|---------------------------------------------|
| the next sequence number                              | in order    | applied                                     |
| one not above the last, later `ts`, other bytes       | a restart   | new epoch: everything known is forgotten    |
| one not above the last, otherwise                     | a duplicate | dropped                                     |
| one above the next                                    | a gap       | held back; replay from the last (inclusive) |
| replay answers other bytes for the last               | a restart   | new epoch; replay from 0                    |
| replay from the last is complete                      | gap closed  | still exact                                 |
| no replay, refused, cut short, or it begins too late  | a loss      | *inexact*: earlier entries become doubtful  |
| an event that cannot be read                          | a loss      | the same                                    |
| `process_start_time_seconds` later than the epoch     | a restart   | new epoch; replay from 0                    |
| the first message heard is not 0                      | joined late | replay from 0; failing that, inexact        |
| everything cleared                                    |             | exact, whatever was lost before             |

A stream that lost something tries now and then to replay from 0: if the engine still has everything, the index is built
again beside the doubtful entries, which are then dropped, and the engine is exact without having been forgotten.

The caller performs the effects in order. Time is an argument; nothing here does I/O.
Source: vLLM 0.32 `distributed/kv_events.py` (`ZmqEventPublisher`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TypeAlias

from kvatlas_common.events.types import AllBlocksCleared, EventBatch
from kvatlas_common.fleet import Sync


@dataclass(frozen=True, slots=True)
class Message:
    """One decoded message of an engine. `digest` tells its bytes from others; `size` in bytes."""

    seq: int
    digest: int
    size: int
    batch: EventBatch

    @property
    def ts(self) -> float:
        return self.batch.ts


@dataclass(frozen=True, slots=True)
class Limits:
    held_back_max: int = 4096  # messages held back while a replay runs
    held_back_bytes_max: int = 64 << 20
    replay_stall_s: float = 5.0  # a replay that brings nothing for so long has failed
    replay_attempts: int = 3
    replay_retry_s: float = 0.5  # doubled with each attempt
    rebuild_interval_s: float = 30.0  # until a stream that lost something replays from 0; doubled with each attempt
    rebuild_interval_max_s: float = 900.0
    digests_kept: int = 1024  # of the latest applied messages, to tell a duplicate from a restart


# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Apply:
    message: Message


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """The engine's cache began anew: forget everything it held."""

    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Messages were lost: what is known so far stays usable but is doubtful."""

    reason: str


@dataclass(frozen=True, slots=True)
class DropDoubtful:
    """Everything still held has been confirmed since: forget what has not."""


@dataclass(frozen=True, slots=True)
class RequestReplay:
    first_seq: int
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CancelReplay:
    pass


@dataclass(frozen=True, slots=True)
class Duplicate:
    seq: int


Effect: TypeAlias = Apply | BeginEpoch | Doubt | DropDoubtful | RequestReplay | CancelReplay | Duplicate


class ReplayEnd(StrEnum):
    """How a replay ended."""

    COMPLETE = "complete"  # the end marker was seen
    REFUSED = "refused"  # nobody answered
    TRUNCATED = "truncated"  # it stopped before the end marker


class _Mode(Enum):
    LIVE = "live"  # applying messages as they come
    FILL = "fill"  # replaying from the last applied message; live ones are held back
    JOIN = "join"  # replaying from 0 into an empty epoch; live ones are held back
    REBUILD = "rebuild"  # replaying from 0 beside what is known; live ones are held back


class Stream:
    """The state machine of the table above, for one engine (one rank)."""

    def __init__(self, *, can_replay: bool, limits: Limits | None = None) -> None:
        self.can_replay = can_replay
        self.last: int | None = None
        self._limits = limits or Limits()
        self._mode = _Mode.LIVE
        self._whole = False  # everything since the epoch began (or the last clear) has been applied
        self._loss = ""
        self._heard = False
        self._last_ts = 0.0
        self._epoch_ts: float | None = None
        self._process_start: float | None = None
        self._digests: OrderedDict[int, int] = OrderedDict()
        self._held: list[Message] = []
        self._held_bytes = 0
        self._attempts = 0
        self._progress_at = 0.0
        self._replayed = False  # this replay has brought a message
        self._last_before: int | None = None  # the last applied message when the replay began
        self._rebuild_at: float | None = None
        self._rebuilds = 0

    # -- what the caller may ask ---------------------------------------------------------------------------------------

    @property
    def sync(self) -> Sync:
        if self._whole and self._mode is _Mode.LIVE:
            return Sync.EXACT
        if self._mode is not _Mode.LIVE:
            return Sync.SYNCING
        return Sync.INEXACT if self._heard else Sync.UNKNOWN

    @property
    def inexact_reason(self) -> str:
        return "" if self.sync is not Sync.INEXACT else self._loss

    @property
    def held_back(self) -> int:
        return len(self._held)

    # -- what happens to it --------------------------------------------------------------------------------------------

    def on_attached(self, now: float) -> list[Effect]:
        """The engine is known and can be asked what it published before: an idle engine becomes exact that way."""
        if self._heard or self._mode is not _Mode.LIVE or not self.can_replay:
            return []
        return self._start(_Mode.JOIN, now)

    def on_message(self, message: Message, now: float) -> list[Effect]:
        """A live message."""
        self._heard = True
        if self._is_restart(message):
            return self._restart(message, f"its messages began again at {message.seq}", now)
        if self._mode is not _Mode.LIVE:
            return self._hold(message, now)
        if self.last is None:
            return self._first(message, now)
        if message.seq <= self.last:
            return [Duplicate(message.seq)]
        if message.seq == self.last + 1:
            return self._apply(message)
        if self.can_replay:
            return [*self._start(_Mode.FILL, now), *self._hold(message, now)]
        return [self._lose(f"messages {self.last + 1}..{message.seq - 1} lost", now), *self._apply(message)]

    def on_replayed(self, message: Message, now: float) -> list[Effect]:
        """A message of the replay under way."""
        if self._mode is _Mode.LIVE:
            return [Duplicate(message.seq)]
        self._heard, self._progress_at = True, now
        first, self._replayed = not self._replayed, True
        if self._mode is _Mode.FILL:
            return self._fill(message, first, now)
        if first and message.seq > 0:
            return self._begins_late(message, now)
        if first:
            return [*self._from_zero(), *self._apply(message)]
        return self._next_replayed(message, now)

    def on_replay_end(self, end: ReplayEnd, now: float) -> list[Effect]:
        """The replay under way has ended; held-back messages follow, or it is tried again."""
        if self._mode is _Mode.LIVE:
            return []
        if end is not ReplayEnd.COMPLETE:
            return self._failed(f"replay was {end}", now)
        effects: list[Effect] = []
        mode, self._mode = self._mode, _Mode.LIVE
        if mode is _Mode.JOIN and not self._replayed and not self._held:
            self._whole, self._loss = True, ""  # it has published nothing yet: known to be empty
        if mode is _Mode.REBUILD and self._replayed:
            effects.append(DropDoubtful())
        self._attempts = 0
        return effects + self._release(now, "" if self.last != self._last_before else "replay brought nothing new")

    def on_unusable(self, reason: str, now: float) -> list[Effect]:
        """An event of an applied message could not be used, and it may have changed the cache."""
        if not self._whole:
            return []
        return [self._lose(reason, now)]

    def on_returned(self, now: float) -> list[Effect]:
        """The engine was out of reach and is back: messages may have been lost without another one to show it."""
        if self._mode is not _Mode.LIVE or not self.can_replay:
            return []
        return self._start(_Mode.JOIN if self.last is None else _Mode.FILL, now)

    def on_process_start(self, start_s: float, now: float) -> list[Effect]:
        """The engine's own `process_start_time_seconds`. Changed, and later than this epoch: it has restarted."""
        known, self._process_start = self._process_start, start_s
        if known is None or start_s <= known + 1.0 or not self._heard:
            return []
        if self._epoch_ts is not None and self._epoch_ts >= start_s - 1.0:
            return []  # the stream has shown it already
        effects: list[Effect] = [*self._cancel(), self._begin_epoch("its process has restarted")]
        held = [m for m in self._held if m.ts >= start_s - 1.0]
        self._drop_held()
        for message in held:
            effects += self.on_message(message, now)
        if not held and self.can_replay:
            effects += self._start(_Mode.JOIN, now)
        return effects

    def on_tick(self, now: float) -> list[Effect]:
        """Now and then: gives up a replay that has stalled; tries to become exact again."""
        if self._mode is not _Mode.LIVE:
            if now - self._progress_at < self._limits.replay_stall_s:
                return []
            return [CancelReplay(), *self._failed("replay stalled", now)]
        if self._rebuild_at is not None and now >= self._rebuild_at and self.can_replay:
            self._rebuild_at = None
            return self._start(_Mode.REBUILD, now)
        return []

    # -- the rules -----------------------------------------------------------------------------------------------------

    def _is_restart(self, message: Message) -> bool:
        if self._held:
            newest = self._held[-1]
            if message.seq <= newest.seq and message.ts > newest.ts and message.digest != newest.digest:
                return True
        return (
            self.last is not None
            and message.seq <= self.last
            and message.ts > self._last_ts
            and self._digests.get(message.seq) != message.digest
        )

    def _restart(self, message: Message, reason: str, now: float) -> list[Effect]:
        effects: list[Effect] = [*self._cancel(), self._begin_epoch(reason)]
        self._drop_held()
        return effects + self._first(message, now)

    def _first(self, message: Message, now: float) -> list[Effect]:
        """The first message of an epoch."""
        if message.seq == 0:
            self._whole, self._loss = True, ""
            return self._apply(message)
        if self.can_replay:
            return [*self._start(_Mode.JOIN, now), *self._hold(message, now)]
        self._whole, self._loss = False, f"joined at message {message.seq}, and there is no replay endpoint to ask"
        return self._apply(message)

    def _apply(self, message: Message) -> list[Effect]:
        self.last, self._last_ts = message.seq, message.ts
        if self._epoch_ts is None:
            self._epoch_ts = message.ts
        self._digests[message.seq] = message.digest
        if len(self._digests) > self._limits.digests_kept:
            self._digests.popitem(last=False)
        if any(isinstance(event, AllBlocksCleared) for event in message.batch.events):
            self._whole, self._loss, self._rebuild_at = True, "", None
        return [Apply(message)]

    def _fill(self, message: Message, first: bool, now: float) -> list[Effect]:
        assert self.last is not None
        if first and message.seq == self.last:
            if message.digest == self._digests.get(self.last):
                return []
            effects: list[Effect] = [CancelReplay(), self._begin_epoch("replay of the last message has other bytes")]
            return effects + self._start(_Mode.JOIN, now)
        return self._next_replayed(message, now)

    def _next_replayed(self, message: Message, now: float) -> list[Effect]:
        if self.last is not None and message.seq <= self.last:
            return [Duplicate(message.seq)]
        expected = 0 if self.last is None else self.last + 1
        lost: list[Effect] = []
        if message.seq > expected:
            lost = [self._lose(f"messages {expected}..{message.seq - 1} lost, and no longer replayed", now)]
        return lost + self._apply(message)

    def _begins_late(self, message: Message, now: float) -> list[Effect]:
        """A replay from 0 that begins later: the engine no longer has its first messages."""
        reason = f"joined late: replay reaches back to message {message.seq} only"
        if self._mode is _Mode.REBUILD:  # not worth it: nothing would become exact, now or later
            self._rebuild_at, self._mode = None, _Mode.LIVE
            return [CancelReplay(), *self._release(now)]
        self._whole, self._loss = False, reason
        return self._apply(message)

    def _from_zero(self) -> list[Effect]:
        """A replay from 0 has begun at 0: everything will be known once it is through."""
        effects: list[Effect] = [Doubt("building again from message 0")] if self._mode is _Mode.REBUILD else []
        self.last, self._epoch_ts, self._whole, self._loss = None, None, True, ""
        self._digests.clear()
        return effects

    def _failed(self, why: str, now: float) -> list[Effect]:
        self._attempts += 1
        if self._attempts < self._limits.replay_attempts:
            if self._mode is _Mode.FILL:
                self._replayed = False
            delay = self._limits.replay_retry_s * 2 ** (self._attempts - 1)
            self._progress_at = now + delay
            return [RequestReplay(self._first_wanted(), delay)]
        mode, self._mode, self._attempts = self._mode, _Mode.LIVE, 0
        effects: list[Effect] = []
        if mode is not _Mode.FILL and self._replayed:
            effects.append(self._lose(f"{why}: what the engine stored after message {self.last} is not known", now))
        else:
            self._schedule_rebuild(now)
        return effects + self._release(now, why)

    def _lose(self, reason: str, now: float) -> Effect:
        self._whole, self._loss = False, reason
        self._schedule_rebuild(now)
        return Doubt(reason)

    def _schedule_rebuild(self, now: float) -> None:
        if self.can_replay and self._rebuild_at is None:
            delay = self._limits.rebuild_interval_s * 2.0**self._rebuilds
            self._rebuild_at = now + min(delay, self._limits.rebuild_interval_max_s)
            self._rebuilds = min(self._rebuilds + 1, 16)

    def _begin_epoch(self, reason: str) -> BeginEpoch:
        self.last, self._epoch_ts, self._whole, self._loss = None, None, False, reason
        self._digests.clear()
        self._rebuild_at, self._rebuilds = None, 0
        return BeginEpoch(reason)

    # -- replay and what is held back ----------------------------------------------------------------------------------

    def _start(self, mode: _Mode, now: float) -> list[Effect]:
        self._mode, self._progress_at, self._replayed, self._last_before = mode, now, False, self.last
        return [RequestReplay(self._first_wanted())]

    def _first_wanted(self) -> int:
        """A gap is replayed from the last applied message, inclusive: its bytes tell whether the engine is the same."""
        if self._mode is _Mode.FILL:
            return self.last or 0
        return 0 if self.last is None or self._mode is _Mode.REBUILD else self.last + 1

    def _cancel(self) -> list[Effect]:
        busy, self._mode, self._attempts = self._mode is not _Mode.LIVE, _Mode.LIVE, 0
        return [CancelReplay()] if busy else []

    def _hold(self, message: Message, now: float) -> list[Effect]:
        self._held.append(message)
        self._held_bytes += message.size
        if len(self._held) <= self._limits.held_back_max and self._held_bytes <= self._limits.held_back_bytes_max:
            return []
        effects: list[Effect] = list(self._cancel())
        return effects + self._release(now, "more messages were held back than fit")

    def _drop_held(self) -> None:
        self._held, self._held_bytes = [], 0

    def _release(self, now: float, why: str = "") -> list[Effect]:
        """Applies what was held back. What is still missing is asked for again, unless `why` says that was given up."""
        held, effects = sorted(self._held, key=lambda m: m.seq), list[Effect]()
        self._drop_held()
        for message in held:
            missing = self.last is not None and message.seq > self.last + 1
            if self._mode is _Mode.LIVE and why and missing:
                effects.append(self._lose(f"messages {(self.last or 0) + 1}..{message.seq - 1} lost: {why}", now))
                effects += self._apply(message)
            elif self._mode is _Mode.LIVE and why and self.last is None and message.seq > 0:
                self._whole, self._loss = False, self._loss or f"joined at message {message.seq}: {why}"
                effects += self._apply(message)
            else:
                effects += self.on_message(message, now)
        return effects
