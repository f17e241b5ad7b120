"""Order: one engine's messages, as they come, to batches applied once each and in sequence.

Sequence numbers start at 0 with each life of the engine's publisher (an *epoch*) and rise by one. What can go wrong,
and what follows:

| seen                                                  | means       | done                                        |
|-------------------------------------------------------|-------------|---------------------------------------------|
| the next sequence number                              | in order    | applied                                     |
| one not above the last, later `ts`, other bytes       | a restart   | new epoch: everything known is forgotten    |
| one not above the last, otherwise                     | a duplicate | dropped                                     |
| one from before this epoch, by its `ts`               | left over   | dropped: the old connection drains late     |
| one above the next                                    | a gap       | held back; replay from the last (inclusive) |
| a replay answers other bytes for what was applied     | a restart   | new epoch; replay from 0                    |
| a replay begins with the last and is complete         | gap closed  | still exact                                 |
| no replay, refused, cut short, or it begins too late  | a loss      | *inexact*: earlier entries become doubtful  |
| an event that cannot be read                          | a loss      | the same                                    |
| `process_start_time_seconds` later than the epoch     | a restart   | new epoch; replay from 0                    |
| the first message heard is not 0                      | joined late | replay from 0; failing that, inexact        |
| the engine is back after being out of reach           | perhaps a   | replay from the last; failing that, inexact |
|                                                       | loss        | until the next message is the next in order |
| everything cleared                                    |             | exact, whatever was lost before             |

A stream that lost something tries now and then to replay from 0: if the engine still has everything, the index is built
again beside the doubtful entries, which are then dropped, and the engine is exact without having been forgotten.

Whatever is replayed in continuation of what was applied begins with the last applied message once more: only its bytes
tell that the engine which answers is the engine that was heard.

The caller performs the effects in order. Time is an argument; nothing here does I/O.
Source: vLLM 0.32 `distributed/kv_events.py` (`ZmqEventPublisher`).
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from kvatlas_common.events.types import AllBlocksCleared
from kvatlas_common.fleet import Sync
from kvatlas_indexer.core.effects import (
    Apply,
    BeginEpoch,
    BuildAgain,
    CancelReplay,
    Doubt,
    DropDoubtful,
    Duplicate,
    Effect,
    Message,
    ReplayEnd,
    RequestReplay,
)
from kvatlas_indexer.core.held import HeldBack, Limits, Retry

__all__ = ["Limits", "Message", "ReplayEnd", "Stream"]

CLOCK_SLACK_S = 1.0
"""`process_start_time_seconds` is rounded to the kernel's ticks, and derived from a boot time that is rounded too."""


class _Mode(Enum):
    LIVE = "live"  # applying messages as they come
    FILL = "fill"  # replaying from the last applied message; live ones are held back
    JOIN = "join"  # replaying from 0 into an empty epoch; live ones are held back
    REBUILD = "rebuild"  # replaying from 0 beside what is known; live ones are held back


class Stream:
    """The state machine of the table above, for one engine (one rank)."""

    def __init__(self, *, can_replay: bool, limits: Limits | None = None) -> None:
        self.can_replay = can_replay
        self.last: int | None = None  # the last message applied in this epoch
        self.complete = False  # everything since the epoch began has been applied: a clear does not make up for it
        self._limits = limits or Limits()
        self._mode = _Mode.LIVE
        self._whole = False  # everything since the epoch began (or the last clear) has been applied
        self._loss = ""
        self._unsure = ""  # why messages may have been lost without another one to show it
        self._heard = False
        self._last_ts = 0.0
        self._floor_ts = -1.0  # nothing of this epoch is as old as that
        self._epoch_ts: float | None = None
        self._process_start: float | None = None
        self._digests: OrderedDict[int, int] = OrderedDict()
        self._held = HeldBack(self._limits)
        self._attempts = 0
        self._progress_at = 0.0
        self._answered = False  # the replay asked for last has brought a message
        self._from_zero = False  # a replay from 0 began at 0, and what it brings is being applied
        self._last_before: int | None = None  # the last applied message when the replay began
        self._retry = Retry(self._limits)
        self._attached = False
        self._again = False  # the engine has come back while a replay was under way

    @property
    def sync(self) -> Sync:
        if self._mode is not _Mode.LIVE:
            return Sync.SYNCING
        if self._whole and not self._unsure:
            return Sync.EXACT
        return Sync.INEXACT if self._heard else Sync.UNKNOWN

    @property
    def inexact_reason(self) -> str:
        return "" if self.sync is not Sync.INEXACT else self._loss or self._unsure

    @property
    def held_back(self) -> int:
        return len(self._held)

    @property
    def replaying(self) -> bool:
        return self._mode is not _Mode.LIVE

    @property
    def lost(self) -> bool:
        """Whether something of this epoch was lost, and nothing has made up for it since."""
        return self._heard and not self._whole

    def standing(self) -> tuple[bool, str, float | None, float | None]:
        """What a successor needs beside the last message: `resume` takes it."""
        return self._whole and not self._unsure, self._loss or self._unsure, self._epoch_ts, self._process_start

    @property
    def last_message(self) -> tuple[int, float, int] | None:
        """Sequence number, `ts` and digest of the last message applied in this epoch."""
        return None if self.last is None else (self.last, self._last_ts, self._digests[self.last])

    # -- what happens to it --------------------------------------------------------------------------------------------

    def resume(
        self, *, last: int, ts: float, digest: int, standing: tuple[bool, str, float | None, float | None]
    ) -> None:
        """Goes on where another owner of the engine stood; `on_returned` asks for what was published since."""
        self.last, self._last_ts, self._digests[last] = last, ts, digest
        self._whole, self._loss, self._epoch_ts, self._process_start = standing
        self._heard = True

    def on_attached(self, now: float) -> list[Effect]:
        """The engine is known; if it can be asked what it published before, even an idle one becomes exact."""
        if not self.can_replay:
            self._attached = False
            return []
        if self._attached or self._whole or self._mode is not _Mode.LIVE:
            return []
        self._attached = True
        return self._start(_Mode.JOIN if self.last is None else _Mode.REBUILD, now)

    def on_message(self, message: Message, now: float) -> list[Effect]:
        """A live message."""
        self._heard = True
        if self._is_left_over(message):
            return [Duplicate(message.seq)]
        if self._mode is _Mode.LIVE and self.last is not None and message.seq == self.last + 1:  # as nearly all are
            return self._apply(message)
        if self._is_restart(message):
            return self._restart(message, f"its messages began again at {message.seq}", now)
        if self.last is not None and message.seq <= self.last:
            return [Duplicate(message.seq)]
        if self._mode is not _Mode.LIVE:
            return self._hold(message, now)
        if self.last is None:
            return self._first(message, now)
        if self.can_replay:
            return [*self._start(_Mode.FILL, now), *self._hold(message, now)]
        return [self._lose(f"{_between(self.last, message.seq)} lost", now), *self._apply(message)]

    def on_replayed(self, message: Message, now: float) -> list[Effect]:
        """A message of the replay under way."""
        if self._mode is _Mode.LIVE:
            return [Duplicate(message.seq)]
        self._heard, self._progress_at = True, now
        first, self._answered = not self._answered, True
        if self._has_other_bytes(message):
            return self._replayed_by_another(message, now)
        if first and self._begins_anew:
            return self._replay_from_zero(message, now)
        assert self.last is not None
        if message.seq <= self.last:
            return [] if first else [Duplicate(message.seq)]
        if first:
            return [self._lose(f"replay reaches back to message {message.seq} only", now), *self._apply(message)]
        if message.seq > self.last + 1:
            lost = f"{_between(self.last, message.seq)} lost, and no longer replayed"
            return [self._lose(lost, now), *self._apply(message)]
        return self._apply(message)

    def on_replay_end(self, end: ReplayEnd, now: float) -> list[Effect]:
        """The replay under way has ended; held-back messages follow, or it is tried again."""
        if self._mode is _Mode.LIVE:
            return []
        if end is not ReplayEnd.COMPLETE:
            return self._failed(f"replay was {end}", now)
        effects: list[Effect] = []
        mode, self._mode, self._attempts = self._mode, _Mode.LIVE, 0
        self._unsure = ""
        if self._answered:
            if mode is _Mode.REBUILD and self._whole:
                self._retry.succeeded()
                effects.append(DropDoubtful())
        elif self.last is not None:
            effects.append(self._lose(f"the engine no longer knows message {self.last}", now))
        elif not self._held:
            self.complete, self._whole, self._loss = True, True, ""  # it has published nothing yet: known to be empty
        return effects + self._release(now, "" if self.last != self._last_before else "replay brought nothing new")

    def on_unusable(self, reason: str, now: float) -> list[Effect]:
        """An event of an applied message could not be used, and it may have changed the cache.

        A replay would bring the same bytes again, so none is planned.
        """
        self.complete, self._whole, self._loss = False, False, reason
        return [Doubt(reason)]

    def on_returned(self, now: float) -> list[Effect]:
        """The engine was out of reach and is back: messages may have been lost without another one to show it."""
        if self._mode is not _Mode.LIVE:
            self._again = True  # the replay under way may have begun too early
            return []
        if self.can_replay:
            return self._start(_Mode.JOIN if self.last is None else _Mode.FILL, now)
        if self.last is not None:
            self._unsure = "it was out of reach, and there is no replay endpoint to ask what it published meanwhile"
        return []

    def on_process_start(self, start_s: float, now: float) -> list[Effect]:
        """The engine's own `process_start_time_seconds`. Changed, and later than this epoch: it has restarted."""
        known = self._process_start
        if known is not None and start_s <= known + CLOCK_SLACK_S:
            return []
        self._process_start, began = start_s, start_s - CLOCK_SLACK_S
        if known is None or (self._epoch_ts is not None and self._epoch_ts >= began):
            return []  # nothing to compare with, or the stream has shown it already
        effects: list[Effect] = [*self._cancel()]
        if self.last is not None or self._whole:
            effects.append(self._begin_epoch("its process has restarted"))
        self._floor_ts = max(self._floor_ts, began)
        self._held.keep_since(began)
        held = self._held.take()
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
        if not self.can_replay or not self._retry.is_due(now):
            return []
        if self.last is None:
            return self._start(_Mode.JOIN, now)
        return self._start(_Mode.FILL if self._whole else _Mode.REBUILD, now)

    # -- the rules -----------------------------------------------------------------------------------------------------

    def _is_left_over(self, message: Message) -> bool:
        ts = message.ts
        return ts <= self._floor_ts or (self._epoch_ts is not None and ts < self._epoch_ts)

    def _is_restart(self, message: Message) -> bool:
        top = self._held.top
        if top is not None and message.seq <= top.seq and message.ts > top.ts:
            return True
        return (
            self.last is not None
            and message.seq <= self.last
            and message.ts > self._last_ts
            and self._digests.get(message.seq) != message.digest
        )

    def _restart(self, message: Message, reason: str, now: float) -> list[Effect]:
        effects: list[Effect] = [*self._cancel(), self._begin_epoch(reason)]
        self._held.take()
        return effects + self._first(message, now)

    def _first(self, message: Message, now: float) -> list[Effect]:
        """The first message of an epoch."""
        if message.seq == 0:
            self.complete, self._whole, self._loss = True, True, ""
            return self._apply(message)
        if self.can_replay:
            return [*self._start(_Mode.JOIN, now), *self._hold(message, now)]
        self._whole, self._loss = False, f"joined at message {message.seq}, and there is no replay endpoint to ask"
        return self._apply(message)

    def _apply(self, message: Message) -> list[Effect]:
        self.last, self._last_ts, self._unsure = message.seq, max(self._last_ts, message.ts), ""
        if self._epoch_ts is None and message.ts > 0:
            self._epoch_ts = message.ts
        self._digests[message.seq] = message.digest
        if len(self._digests) > self._limits.digests_kept:
            self._digests.popitem(last=False)
        if AllBlocksCleared in map(type, message.batch.events):
            self._whole, self._loss = True, ""
            self._retry.call_off()
        return [Apply(message)]

    def _has_other_bytes(self, message: Message) -> bool:
        return self._digests.get(message.seq, message.digest) != message.digest

    def _replayed_by_another(self, message: Message, now: float) -> list[Effect]:
        """Another life of the engine answers. What was held back from before it is of no use any more."""
        effects: list[Effect] = [
            CancelReplay(),
            self._begin_epoch(f"replay of message {message.seq} has other bytes"),
        ]
        self._held.keep_since(message.ts)
        return effects + self._start(_Mode.JOIN, now)

    def _replay_from_zero(self, message: Message, now: float) -> list[Effect]:
        """The first message of a replay from 0. If it is not 0, the engine no longer has its first messages."""
        if message.seq > 0 and self._mode is _Mode.REBUILD:  # nothing would become exact, now or later
            return [*self._cancel(), *self._release(now)]
        if message.seq > 0:
            self._whole, self._loss = False, f"joined late: replay reaches back to message {message.seq} only"
            return self._apply(message)
        effects: list[Effect] = [BuildAgain()] if self._mode is _Mode.REBUILD else []
        self.last, self._epoch_ts, self._from_zero = None, None, True
        self.complete, self._whole, self._loss = True, True, ""
        self._digests.clear()
        return effects + self._apply(message)

    def _failed(self, why: str, now: float) -> list[Effect]:
        self._attempts += 1
        if self._attempts < self._limits.replay_attempts:
            self._answered = False
            delay = self._limits.replay_retry_s * 2 ** (self._attempts - 1)
            self._progress_at = now + delay
            return [RequestReplay(self._first_wanted(), delay)]
        return self._give_up(why, now)

    def _give_up(self, why: str, now: float) -> list[Effect]:
        """The replay under way has failed for good: what it did not bring is lost."""
        effects: list[Effect] = []
        mode, from_zero = self._mode, self._from_zero
        self._cancel()
        if from_zero:
            effects.append(self._lose(f"{why}: what the engine stored after message {self.last} is not known", now))
        elif mode is _Mode.FILL and not self._held:
            self._unsure = f"it was out of reach, and what it published meanwhile cannot be asked for: {why}"
        self._retry.plan(now)
        return effects + self._release(now, why)

    def _lose(self, reason: str, now: float) -> Effect:
        self.complete, self._whole, self._loss = False, False, reason
        self._retry.plan(now)
        return Doubt(reason)

    def _begin_epoch(self, reason: str) -> BeginEpoch:
        self.last, self._epoch_ts, self.complete, self._whole, self._loss = None, None, False, False, reason
        self._floor_ts, self._last_ts = max(self._floor_ts, self._last_ts), 0.0
        self._unsure, self._from_zero = "", False
        self._digests.clear()
        self._retry = Retry(self._limits)
        return BeginEpoch(reason)

    def _start(self, mode: _Mode, now: float) -> list[Effect]:
        self._mode, self._progress_at, self._last_before = mode, now, self.last
        self._answered = self._from_zero = self._again = False
        return [RequestReplay(self._first_wanted())]

    @property
    def _begins_anew(self) -> bool:
        return self.last is None or (self._mode is _Mode.REBUILD and not self._from_zero)

    def _first_wanted(self) -> int:
        return 0 if self.last is None or self._begins_anew else self.last

    def _cancel(self) -> list[Effect]:
        busy, self._mode, self._attempts = self._mode is not _Mode.LIVE, _Mode.LIVE, 0
        self._from_zero = False
        return [CancelReplay()] if busy else []

    def _hold(self, message: Message, now: float) -> list[Effect]:
        if self._held.add(message):
            return []
        return [CancelReplay(), *self._give_up("more messages were held back than fit", now)]

    def _release(self, now: float, why: str = "") -> list[Effect]:
        """Applies what was held back. What is still missing is asked for again, unless `why` says that was given up."""
        effects: list[Effect] = []
        for message in self._held.take():
            given_up = bool(why) and self._mode is _Mode.LIVE
            if given_up and self.last is not None and message.seq > self.last + 1:
                effects.append(self._lose(f"{_between(self.last, message.seq)} lost: {why}", now))
                effects += self._apply(message)
            elif given_up and self.last is None and message.seq > 0:
                self._whole, self._loss = False, f"joined at message {message.seq}: {why}"
                effects += self._apply(message)
            else:
                effects += self.on_message(message, now)
        return effects + (self.on_returned(now) if self._again and self._mode is _Mode.LIVE else [])


def _between(last: int, seq: int) -> str:
    return f"message {last + 1}" if seq == last + 2 else f"messages {last + 1}..{seq - 1}"
