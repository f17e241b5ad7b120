"""What was predicted against what the engines did, request by request. Pure.

A request is compared strictly if nothing else was in flight at its engine while it was: then its prediction must be
what the engine reports. With neighbours in flight the engine may have cached more (blocks a neighbour computed since)
or less (blocks evicted for it) than when the prediction was fixed, and a difference is explained by naming them.
Engines publish from a thread of their own, so the events of an answer's last blocks may arrive after the answer: a
request sent at once after it may find more cached than was known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVENTS_UNDER_WAY_S = 0.25  # on a machine with fewer cores than engines


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its answer, as the client saw them. Times in seconds, on one clock."""

    number: int
    kind: str
    streamed: bool
    conversation: int | None
    turn: int
    status: int
    engine: str | None
    reason: str
    predicted: int | None  # cached tokens, from the response header
    actual: int | None  # cached tokens, from the engine's usage
    prompt_tokens: int
    sent_s: float
    done_s: float
    error: str = ""

    @property
    def comparable(self) -> bool:
        return self.status == 200 and self.predicted is not None and self.actual is not None

    @property
    def equal(self) -> bool:
        return self.comparable and self.predicted == self.actual

    def overlaps(self, other: Exchange) -> bool:
        return self.engine == other.engine and self.sent_s < other.done_s and other.sent_s < self.done_s


@dataclass(frozen=True, slots=True)
class Difference:
    exchange: Exchange
    neighbours: tuple[int, ...]  # requests in flight at the same engine
    idle_s: float | None  # since the engine's last answer before it; None: it was its first

    @property
    def events_under_way(self) -> bool:
        """More was cached than was known, right after an answer."""
        more = (self.exchange.actual or 0) > (self.exchange.predicted or 0)
        return more and self.idle_s is not None and self.idle_s < EVENTS_UNDER_WAY_S

    @property
    def explained(self) -> bool:
        return bool(self.neighbours) or self.events_under_way

    def __str__(self) -> str:
        e = self.exchange
        what = f"#{e.number} ({e.kind}, turn {e.turn}) at {e.engine}: predicted {e.predicted}, was {e.actual}"
        if self.neighbours:
            return f"{what}: in flight there at once with {', '.join(f'#{n}' for n in self.neighbours)}"
        if self.events_under_way:
            return f"{what}: sent {(self.idle_s or 0) * 1000:.0f} ms after the last answer there, events under way"
        idle = "its first request" if self.idle_s is None else f"sent {self.idle_s * 1000:.0f} ms after the last answer"
        return f"{what}: UNEXPLAINED, alone at its engine, {idle}; reason {e.reason}"


@dataclass(frozen=True, slots=True)
class Stray:
    """A follow-up that left its conversation's engine."""

    exchange: Exchange
    home: Exchange  # the turn before

    @property
    def after_s(self) -> float:
        """How long after the answer before it was sent."""
        return self.exchange.sent_s - self.home.done_s

    @property
    def overtook(self) -> bool:
        """Sent so soon that its home may not have published what it holds."""
        return self.after_s < EVENTS_UNDER_WAY_S

    def __str__(self) -> str:
        e = self.exchange
        return (
            f"#{e.number} (turn {e.turn} of conversation {e.conversation}) went to {e.engine}, its home is "
            f"{self.home.engine} (#{self.home.number}, answered {self.after_s * 1000:.0f} ms before); "
            f"predicted {e.predicted}, was {e.actual}, reason {e.reason}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run. `strict`: compared, nothing else in flight at the engine; `homes`: follow-ups of those."""

    requests: int
    failed: tuple[Exchange, ...]
    strict: int
    strict_equal: int
    loose: int
    loose_equal: int
    incomparable: int
    homes: int
    homes_found: int
    predicted_tokens: int
    actual_tokens: int
    prompt_tokens: int
    differences: tuple[Difference, ...]
    strayed: tuple[Stray, ...]
    reasons: Mapping[str, int]
    per_engine: Mapping[str, int]

    @property
    def exact_share(self) -> float:
        """Of all requests that could be compared at all."""
        return (self.strict_equal + self.loose_equal) / max(1, self.strict + self.loose)

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if not d.explained)


def compare(exchanges: Sequence[Exchange]) -> Report:
    """`exchanges` in the order in which they were sent."""
    answered = [e for e in exchanges if e.status == 200]
    neighbours = {e.number: tuple(o.number for o in answered if o is not e and e.overlaps(o)) for e in answered}
    comparable = [e for e in answered if e.comparable]
    strict = [e for e in comparable if not neighbours[e.number]]
    loose = [e for e in comparable if neighbours[e.number]]
    follow_ups = [(e, home) for e in answered if (home := _home(e, answered)) is not None and not neighbours[e.number]]
    return Report(
        requests=len(exchanges),
        failed=tuple(e for e in exchanges if e.status != 200),
        strict=len(strict),
        strict_equal=sum(e.equal for e in strict),
        loose=len(loose),
        loose_equal=sum(e.equal for e in loose),
        incomparable=len(answered) - len(comparable),
        homes=len(follow_ups),
        homes_found=sum(e.engine == home.engine for e, home in follow_ups),
        predicted_tokens=sum(e.predicted or 0 for e in comparable),
        actual_tokens=sum(e.actual or 0 for e in comparable),
        prompt_tokens=sum(e.prompt_tokens for e in comparable),
        differences=tuple(Difference(e, neighbours[e.number], _idle(e, answered)) for e in comparable if not e.equal),
        strayed=tuple(Stray(e, home) for e, home in follow_ups if e.engine != home.engine),
        reasons=Counter(e.reason for e in answered),
        per_engine=Counter(str(e.engine) for e in answered),
    )


def _home(exchange: Exchange, answered: Sequence[Exchange]) -> Exchange | None:
    """The turn before this one: where it was answered, the conversation is held."""
    if exchange.conversation is None or exchange.turn == 0:
        return None
    before = (exchange.conversation, exchange.turn - 1)
    return next((e for e in answered if (e.conversation, e.turn) == before), None)


def _idle(exchange: Exchange, answered: Sequence[Exchange]) -> float | None:
    done = [e.done_s for e in answered if e.engine == exchange.engine and e.done_s <= exchange.sent_s]
    return exchange.sent_s - max(done) if done else None


def table(reports: Mapping[str, Report], more: Mapping[str, Mapping[str, float]]) -> str:
    """One column per configuration; `more`: further figures of each, by name."""
    rows: list[tuple[str, list[str]]] = [
        ("requests", [str(r.requests) for r in reports.values()]),
        ("failed", [str(len(r.failed)) for r in reports.values()]),
        ("alone at the engine: equal", [f"{r.strict_equal}/{r.strict}" for r in reports.values()]),
        ("with neighbours: equal", [f"{r.loose_equal}/{r.loose}" for r in reports.values()]),
        ("not comparable", [str(r.incomparable) for r in reports.values()]),
        ("exact share", [f"{r.exact_share:.2%}" for r in reports.values()]),
        ("follow-ups at home", [f"{r.homes_found}/{r.homes}" for r in reports.values()]),
        ("cached tokens predicted", [str(r.predicted_tokens) for r in reports.values()]),
        ("cached tokens actual", [str(r.actual_tokens) for r in reports.values()]),
        ("cached share of prompts", [f"{r.actual_tokens / max(1, r.prompt_tokens):.0%}" for r in reports.values()]),
        ("requests per engine", ["/".join(str(n) for n in sorted(r.per_engine.values())) for r in reports.values()]),
    ]
    names = list(dict.fromkeys(name for figures in more.values() for name in figures))
    rows += [(name, [f"{more[c].get(name, 0):g}" for c in reports]) for name in names]
    width = max(len(name) for name, _ in rows)
    columns = [max(len(c), *(len(cells[i]) for _, cells in rows)) for i, c in enumerate(reports)]
    lines = [" " * width + "".join(f"  {c:>{w}}" for c, w in zip(reports, columns, strict=True))]
    for name, cells in rows:
        lines.append(f"{name:<{width}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, columns, strict=True)))
    return "\n".join(lines)
