"""Which engines are not to be trusted just now, judged by how the requests sent to them ended.

| trust | an engine gets there by | it is tried | it leaves after |
|---|---|---|---|
| full | an answer | as its cost says | a fault |
| suspect | one fault that shows the engine or its host in trouble | after those of full trust | `suspect_s` |
| ejected | several faults in a row, a share of faults too large, a failed trial | last | `ejection_s` x times ejected |

When its time is over an engine is on *trial*: one request at a time is let through as if the engine had full trust,
until one gets an answer; where that takes long (an answer in one piece), another every `suspect_s`. A request sent to
an engine that was set aside, because there was no other, proves as much: its answer brings the engine back too. So does
a restart (`restarted`): the process that failed is gone. One ejection is forgiven for every `decay_s` without.

Setting an engine aside orders the engines, it never removes one: where all are set aside, all are tried. Beyond
`ejected_share_max` of the fleet no engine is ejected, only suspected, because then the fault is rather between the
router and its engines. A client's own errors (4xx) say nothing about an engine. Slowness is not a fault either: what is
queued and what engines were seen to take is in the cost. The words are Envoy's (outlier detection, v1.30), the trial is
the half-open state of a circuit breaker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import TracebackType
from typing import Final

from kvatlas_common.words import EngineId

BUCKETS = 10  # of the sliding window: a result is forgotten at most a tenth of the window late
NOT_IMPLEMENTED = 501


class Trust(IntEnum):
    """Engines of more trust go first."""

    FULL = 0
    SUSPECT = 1
    EJECTED = 2


class Fault(StrEnum):
    """How an engine failed a request."""

    CONNECT = "connect"
    RESET = "reset"
    GARBAGE = "garbage"  # not HTTP
    STATUS = "status"  # 502 or 503: it, or what stands before it, is going or not there yet
    FIRST_BYTE = "first-byte"  # none in time
    CUT = "cut"  # lost after the first byte
    ERROR = "error"  # any other 5xx: perhaps the request's own doing, so that one alone changes nothing


class Cause(StrEnum):
    """Why an engine was ejected."""

    CONSECUTIVE = "consecutive"
    SHARE = "share"
    TRIAL = "trial"


def fault_of(status: int) -> Fault | None:
    """What an answer's status says against the engine; 501 is about what the client wants."""
    if status in (502, 503):
        return Fault.STATUS
    return Fault.ERROR if status >= 500 and status != NOT_IMPLEMENTED else None


@dataclass(frozen=True, slots=True)
class OutlierRules:
    """`consecutive_max` 0: nothing is ejected, only suspected."""

    consecutive_max: int = 5
    fault_share_max: float = 0.5
    share_requests_min: int = 10  # fewer in the window say nothing
    window_s: float = 30.0
    suspect_s: float = 5.0
    ejection_s: float = 10.0
    ejection_max_s: float = 120.0
    decay_s: float = 60.0
    ejected_share_max: float = 0.5


@dataclass(frozen=True, slots=True)
class Ejection:
    """What has just been decided, for log and figures."""

    engine: EngineId
    cause: Cause
    fault: Fault
    for_s: float


@dataclass(slots=True)
class _Record:
    """`aside_since` is None while the engine has full trust."""

    consecutive: int = 0
    aside_since: float | None = None
    aside_until: float = 0.0
    ejected: bool = False
    times: int = 0  # ejected, less what has decayed
    back_at: float = 0.0
    trials: int = 0  # sent and without an answer
    next_trial_at: float = 0.0
    results: deque[list[int]] = field(default_factory=lambda: deque(maxlen=BUCKETS))  # [bucket, answered, failed]


class Outliers:
    """Of one router. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, rules: OutlierRules = OutlierRules()) -> None:
        self.rules: Final = rules
        self._records: dict[EngineId, _Record] = {}
        self._fleet: frozenset[EngineId] = frozenset()

    def trust(self, engine: EngineId, now: float) -> Trust:
        record = self._records.get(engine)
        if record is None or record.aside_since is None:
            return Trust.FULL
        if now >= record.aside_until and (not record.trials or now >= record.next_trial_at):
            return Trust.FULL  # for the request that will be the trial
        return Trust.EJECTED if record.ejected else Trust.SUSPECT

    def sent(self, engine: EngineId, now: float) -> Attempt:
        """A request goes to the engine; whoever sends it says how it fares, and closes the attempt."""
        record = self._records.setdefault(engine, _Record())
        trial = record.aside_since is not None and now >= record.aside_until
        if trial:
            record.trials += 1
            record.next_trial_at = now + self.rules.suspect_s
        return Attempt(self, engine, record, now, trial)

    def restarted(self, engine: EngineId) -> None:
        """What failed was the engine's former life; requests of that life change nothing any more."""
        self._records.pop(engine, None)

    def keep_only(self, engines: Collection[EngineId]) -> None:
        """The fleet as it is now; engines that left are forgotten."""
        self._fleet = frozenset(engines)
        for engine in self._records.keys() - self._fleet:
            del self._records[engine]

    @property
    def ejected(self) -> int:
        """Engines ejected, those on trial after it included."""
        return sum(r.ejected for r in self._records.values())

    def _may_eject(self) -> bool:
        engines = len(self._fleet) or len(self._records)
        return self.ejected < max(1, int(engines * self.rules.ejected_share_max))

    def _failed(self, engine: EngineId, record: _Record, fault: Fault, now: float, on_trial: bool) -> Ejection | None:
        record.consecutive += 1
        self._count(record, now, failed=True)
        if record.ejected and not on_trial:
            return None  # it is known
        cause = Cause.TRIAL if record.ejected else self._cause(record, now)
        if cause is not None and (record.ejected or self._may_eject()):
            return self._eject(engine, record, cause, fault, now)
        if fault is not Fault.ERROR or on_trial:
            record.aside_since, record.aside_until = now, now + self.rules.suspect_s
        return None

    def _cause(self, record: _Record, now: float) -> Cause | None:
        rules = self.rules
        if not rules.consecutive_max:
            return None
        if record.consecutive >= rules.consecutive_max:
            return Cause.CONSECUTIVE
        oldest = self._bucket(now) - BUCKETS
        recent = [r for r in record.results if r[0] > oldest]
        failed, total = sum(r[2] for r in recent), sum(r[1] + r[2] for r in recent)
        return Cause.SHARE if total >= rules.share_requests_min and failed >= rules.fault_share_max * total else None

    def _eject(self, engine: EngineId, record: _Record, cause: Cause, fault: Fault, now: float) -> Ejection:
        if not record.ejected and self.rules.decay_s:
            record.times = max(0, record.times - int((now - record.back_at) / self.rules.decay_s))
        record.times += 1
        for_s = min(self.rules.ejection_s * record.times, self.rules.ejection_max_s)
        record.ejected, record.aside_since, record.aside_until = True, now, now + for_s
        return Ejection(engine, cause, fault, for_s)

    def _bucket(self, now: float) -> int:
        return int(now * BUCKETS / self.rules.window_s)

    def _count(self, record: _Record, now: float, *, failed: bool) -> None:
        bucket = self._bucket(now)
        if not record.results or record.results[-1][0] != bucket:
            record.results.append([bucket, 0, 0])
        record.results[-1][1 + failed] += 1


class Attempt:
    """One request at one engine: `began`, then `answered`; or `failed`; or, when the client left, only `close`."""

    __slots__ = ("_engine", "_open", "_outliers", "_record", "_sent_at", "_trial")

    def __init__(self, outliers: Outliers, engine: EngineId, record: _Record, sent_at: float, trial: bool) -> None:
        self._outliers = outliers
        self._engine = engine
        self._record = record
        self._sent_at = sent_at
        self._trial = trial
        self._open = True

    def began(self, now: float) -> bool:
        """The first byte of an answer without fault came. True: this brought it back from an ejection."""
        record = self._record
        record.consecutive = 0
        self._end_trial()
        if record.aside_since is None or self._sent_at < record.aside_since:
            return False  # an answer to what was sent before it failed proves nothing
        was_ejected = record.ejected
        record.aside_since, record.ejected = None, False
        if was_ejected:
            record.back_at = now
            record.results.clear()
        return was_ejected

    def answered(self, now: float) -> None:
        """The whole answer came."""
        if self._open:
            self._outliers._count(self._record, now, failed=False)
        self.close()

    def failed(self, fault: Fault, now: float) -> Ejection | None:
        ejection = None
        if self._open:
            since = self._record.aside_since
            on_trial = self._trial and since is not None and self._sent_at >= since
            ejection = self._outliers._failed(self._engine, self._record, fault, now, on_trial)
        self.close()
        return ejection

    def close(self) -> None:
        if self._open:
            self._open = False
            self._end_trial()

    def _end_trial(self) -> None:
        self._record.trials -= self._trial
        self._trial = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
