"""What became of requests, and what that comes to. Pure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvatlas_loadtest.percentiles import percentile

NO_END = "no end"
CUT = "cut"


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what has come of it so far. Times on the monotonic clock.

    `error`: "" for a whole answer; "cut" where an answer had begun and did not end as it should; else why it failed.
    """

    begun: float
    ended: float | None = None
    first_at: float | None = None
    router: str = ""
    status: int = 0
    engine: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    pieces: int = 0
    retried: int = 0
    error: str = NO_END

    def headed(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.error = status, NO_END
        self.engine = headers.get("x-kvatlas-engine", "")
        self.reason = headers.get("x-kvatlas-reason", "")

    def line(self, line: bytes, now: float) -> None:
        """A line of the stream. What follows the end, or an error, is not looked at."""
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or self.error != NO_END:
            return
        self.first_at = self.first_at or now
        if data == b"[DONE]":
            self.error = ""
            return
        try:
            chunk = json.loads(data)
        except ValueError:  # the half of a chunk before a cut
            return
        if "error" in chunk:
            self.broken(f"error instead of an answer: {chunk['error']}")
        self.pieces += bool(chunk.get("choices"))
        if usage := chunk.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens", 0)
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    def broken(self, why: str) -> None:
        """It ended otherwise than with its end: cut if the answer had begun, else failed."""
        if self.error == NO_END:
            self.error = CUT if self.pieces else why

    @property
    def whole(self) -> bool:
        return not self.error

    @property
    def cut(self) -> bool:
        """A stream without an end that had begun counts as cut, whoever noticed."""
        return self.error == CUT or (self.error == NO_END and self.pieces > 0)

    @property
    def failed(self) -> bool:
        return not (self.whole or self.cut)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a number of exchanges come to. Shares 0..1, NaN of nothing; `slowest_s` to the first byte."""

    requests: int = 0
    failed: int = 0
    cut: int = 0
    retried: int = 0
    precise: float = float("nan")
    cached: float = float("nan")
    first_byte_p50_s: float = float("nan")
    slowest_s: float = float("nan")
    reasons: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, exchanges: Sequence[Exchange]) -> Figures:
        waits = sorted(e.first_at - e.begun for e in exchanges if e.first_at is not None)
        reasons = Counter(e.reason for e in exchanges if e.reason)
        return cls(
            requests=len(exchanges),
            failed=sum(e.failed for e in exchanges),
            cut=sum(e.cut for e in exchanges),
            retried=sum(e.retried > 0 for e in exchanges),
            precise=reasons["precise"] / reasons.total() if reasons else float("nan"),
            cached=cached_share(exchanges),
            first_byte_p50_s=percentile(waits, 0.5),
            slowest_s=waits[-1] if waits else float("nan"),
            reasons=dict(reasons),
            failures=dict(Counter(e.error for e in exchanges if e.failed)),
        )


def cached_share(exchanges: Iterable[Exchange]) -> float:
    """Cached of all prompt tokens of the answers that came whole; NaN when none did."""
    whole = [e for e in exchanges if e.whole]
    tokens = sum(e.prompt_tokens for e in whole)
    return sum(e.cached_tokens for e in whole) / tokens if tokens else float("nan")


def cached_over_time(exchanges: Iterable[Exchange], since: float, step_s: float = 1.0) -> list[float | None]:
    """The cached share of the requests begun in each step from `since` on; None where none was answered."""
    steps: dict[int, list[Exchange]] = {}
    for exchange in exchanges:
        if exchange.begun >= since:
            steps.setdefault(int((exchange.begun - since) // step_s), []).append(exchange)
    shares = [cached_share(steps.get(n, [])) for n in range(max(steps, default=-1) + 1)]
    return [None if math.isnan(share) else round(share, 3) for share in shares]
