r"""Results of a run: what must hold of them, as rows for machines and as tables for people. Pure.

| bar | with replay | without |
|---|---|---|
| the index | every engine *exact*, and every shard right about every block, within 5 s of the fault's end | the same \
where no event can have been lost; else no engine is called *exact* that is not |
| nothing wiped | follows | of the blocks the index knew and the engine still holds, 98 % are still said |
| requests | none fails | none fails |
| cached share | rolling restart: within 2 points of the undisturbed one | rolling restart: reported |
| logs | no traceback | no traceback |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvatlas_loadtest.chaos.books import Figures
from kvatlas_loadtest.chaos.plan import Fault

RECOVERY_MAX_S = 5.0
CACHED_DROP_MAX = 0.02
KEPT_MIN = 0.98
SECTION = "chaos"  # of the page it is written to
TROUBLES_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Recovery:
    """One end of a fault. `seconds` until the index was right again; None: too long. `wrong`: what was, until then."""

    ended: str
    seconds: float | None
    wrong: tuple[str, ...] = ()

    @property
    def late(self) -> bool:
        return self.seconds is None or self.seconds > RECOVERY_MAX_S


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario as it went. `sync`: each engine's state at the end. `kept`: share, NaN where it was not asked."""

    fault: Fault
    recoveries: tuple[Recovery, ...]
    figures: Figures
    undisturbed: Figures
    sync: Mapping[str, str] = field(default_factory=dict)
    kept: float = math.nan
    cached_over_time: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()  # of the play itself: a process that did not start, an index wrong beforehand

    @property
    def exact_after_s(self) -> float | None:
        """The longest of its recoveries; None if one did not come."""
        seconds = [r.seconds for r in self.recoveries]
        return max((s for s in seconds if s is not None), default=None) if None not in seconds else None

    @property
    def must_be_exact(self) -> bool:
        return self.fault.replay or not self.fault.scenario.loses_events

    @property
    def cached_drop(self) -> float:
        return self.undisturbed.cached - self.figures.cached

    def broken(self) -> list[str]:
        """Bars that do not hold; empty: all do."""
        broken = list(self.troubles)
        what = "exact and right" if self.must_be_exact else "honest"
        for recovery in self.recoveries:
            if recovery.late:
                when = "not" if recovery.seconds is None else f"only after {recovery.seconds:.1f} s"
                broken.append(f"{when} {what} after: {recovery.ended}; {recovery.wrong[-1:]}")
        if self.figures.failed:
            broken.append(f"{self.figures.failed} requests failed: {dict(self.figures.failures)}")
        if self.kept < KEPT_MIN:
            broken.append(f"{1 - self.kept:.1%} of what was known and still is so has been wiped")
        if self.fault.keeps_cached and not self.cached_drop <= CACHED_DROP_MAX:
            broken.append(f"cached share {self.cached_drop * 100:.1f} points below the undisturbed one")
        return broken


def rows(results: Iterable[Result], elsewhere: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `build/bench.json` has them. `elsewhere`: bars broken by no scenario in particular."""
    found: list[dict[str, Any]] = []
    for result in results:
        scenario, figures = result.fault.scenario, result.figures
        name = f"chaos_{'replay' if result.fault.replay else 'noreplay'}_{scenario.name.replace('-', '_')}"
        what = "exact" if result.must_be_exact else "honest"
        found.append(_row(f"{name}_{what}_after_s", result.exact_after_s, "s", RECOVERY_MAX_S, at_most=True))
        found.append(_row(f"{name}_failed", figures.failed, "requests", 0, at_most=True))
        found.append(_row(f"{name}_cut", figures.cut, "requests"))
        found.append(_row(f"{name}_precise_share", figures.precise, "share"))
        peer = ("undisturbed", result.undisturbed.cached)
        budget = None
        if result.fault.keeps_cached:
            budget = result.undisturbed.cached - CACHED_DROP_MAX
        found.append(_row(f"{name}_cached_share", figures.cached, "share", budget, peer=peer))
        if not math.isnan(result.kept):
            found.append(_row(f"{name}_kept_share", result.kept, "share", KEPT_MIN))
    found.append(_row("chaos_other_bars_broken", len(elsewhere), "bars", 0, at_most=True))
    return found


def _row(
    name: str,
    value: float | None,
    unit: str,
    budget: float | None = None,
    *,
    at_most: bool = False,
    peer: tuple[str, float] | None = None,
) -> dict[str, Any]:
    known = value is not None and not math.isnan(value)
    within = None
    if budget is not None:
        within = known and (value <= budget if at_most else value >= budget)  # type: ignore[operator]
    return {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "budget": _rounded(budget),
        "within": within,
        "peer": peer[0] if peer else None,
        "peer_value": _rounded(peer[1]) if peer else None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


HEADINGS = (
    "fault",
    "right again after",
    "requests",
    "failed",
    "cut",
    "slowest",
    "precise",
    "cached",
    "undisturbed",
    "engines",
)


def cells(result: Result) -> tuple[str, ...]:
    """One line of a table, for `HEADINGS`."""
    figures = result.figures
    seconds = result.exact_after_s
    kept = "" if math.isnan(result.kept) else f", kept {result.kept:.0%}"
    states = sorted(result.sync.values())
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return (
        result.fault.scenario.name,
        "not" if seconds is None else f"{seconds:.1f} s",
        str(figures.requests),
        str(figures.failed),
        str(figures.cut),
        "-" if math.isnan(figures.slowest_s) else f"{figures.slowest_s:.2f} s",
        _percent(figures.precise),
        _percent(figures.cached),
        _percent(result.undisturbed.cached),
        ", ".join(counted) + kept,
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share * 100:.1f} %"


def markdown(results: Sequence[Result], facts: str) -> str:
    """The tables for `docs/reliability.md`. `facts`: what was run, on what."""
    parts = [facts, ""]
    for replay, title in ((True, "With replay endpoints"), (False, "Without replay endpoints")):
        those = [r for r in results if r.fault.replay is replay]
        if not those:
            continue
        parts += [f"### {title}", "", _line(HEADINGS), _line(["---"] * len(HEADINGS))]
        parts += [_line(cells(result)) for result in those]
        parts.append("")
        if not replay:
            parts += ["Cached share of the requests begun in each second from the fault on, in per cent:", ""]
            parts += [f"- {r.fault.scenario.name}: {_series(r.cached_over_time)}" for r in those]
            parts.append("")
    broken = [
        f"- {'with' if r.fault.replay else 'without'} replay, {r.fault.scenario.name}: {b}"
        for r in results
        for b in r.broken()
    ]
    parts += ["Bars that did not hold:", "", *broken, ""] if broken else ["All bars held.", ""]
    return "\n".join(parts)


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _series(shares: Sequence[float | None]) -> str:
    return " ".join("-" if share is None else f"{share * 100:.0f}" for share in shares) or "none"
