"""The tables of a comparison, as values that the terminal and the page both show. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from kvatlas_loadtest.bench.rows import Row
from kvatlas_loadtest.loads.comparison import (
    CACHED,
    FAILED,
    IMBALANCE,
    ITL_P50,
    ITL_P90,
    OF_ORACLE,
    OUTPUT,
    PILED_UP,
    QUEUE,
    SHED,
    TTFT_MEAN,
    TTFT_P50,
    TTFT_P90,
    TTFT_P99,
    Comparison,
    Measure,
    Median,
)  # fmt: skip
from kvatlas_loadtest.loads.published import PUBLISHED

REFERENCE = "reference"
IN_WORKLOAD = (
    TTFT_P90, TTFT_MEAN, TTFT_P50, TTFT_P99, ITL_P50, ITL_P90, OUTPUT, CACHED, OF_ORACLE, IMBALANCE, PILED_UP, QUEUE,
    FAILED, SHED,
)  # fmt: skip
UNRANKED = (PILED_UP, FAILED, SHED)
LEADING = (TTFT_P90, TTFT_MEAN, OUTPUT, CACHED, OF_ORACLE, IMBALANCE)
"""What is told of every workload in one line."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`range`: the least and the most over seeds, where they differ as shown. `bad`: not within its budget."""

    text: str
    range: str = ""
    best: bool = False
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`headings`: one per column, the first of which names the row. `worded`: those of columns without figures.

    `detail`: for whoever looks closer.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    detail: bool = False
    worded: tuple[str, ...] = ()


def tables(comparison: Comparison) -> list[Table]:
    """From the whole to the parts: overall, one measure over all workloads, each workload."""
    several = len(comparison.workloads) > 1
    found = [overall(comparison)] if several else []
    found += [published(comparison)] if REFERENCE in comparison.workloads else []
    found += [over_workloads(comparison, measure) for measure in LEADING] if several else []
    return [*found, *(one_workload(comparison, workload) for workload in comparison.workloads)]


def overall(comparison: Comparison) -> Table:
    """Geometric means over all workloads, and on how many of them a policy is the best."""
    measures = (TTFT_P90, TTFT_MEAN, OUTPUT)
    ranked = sorted(comparison.policies, key=lambda p: comparison.overall(p, TTFT_P90) or float("inf"))
    best = {measure: comparison.best_overall(measure) for measure in measures}
    rows = []
    for policy in ranked:
        cells = [Cell(policy)]
        for measure in measures:
            value, winner = comparison.overall(policy, measure), best[measure]
            cells.append(Cell(shown(value, measure.unit), best=winner is not None and winner[0] == policy))
        first = [w for w in comparison.workloads if (found := comparison.best(w, TTFT_P90)) and found[0] == policy]
        cells.append(Cell(", ".join(first) or "-"))
        rows.append(tuple(cells))
    return Table(
        "Over all workloads",
        ("policy", *(f"{_headed(m)}" for m in measures), "lowest P90 TTFT on"),
        tuple(rows),
        "Geometric means of the medians over seeds.",
        worded=("lowest P90 TTFT on",),
    )


def over_workloads(comparison: Comparison, measure: Measure) -> Table:
    """One measure: policies down, workloads across."""
    rows = []
    for policy in comparison.policies:
        cells = [_cell(comparison, policy, workload, measure) for workload in comparison.workloads]
        rows.append((Cell(policy), *cells))
    return Table(f"{_headed(measure)}, by workload", ("policy", *comparison.workloads), tuple(rows), _seeds(comparison))


def one_workload(comparison: Comparison, workload: str, title: str = "Workload", *, detail: bool = True) -> Table:
    """All measures of one workload, the lowest P90 TTFT first. A column in which everybody has 0 is left out."""
    policies = [policy for policy in comparison.policies if comparison.cell(policy, workload)]
    measures = [m for m in IN_WORKLOAD if any(_value(comparison, p, workload, m) for p in policies)]
    policies.sort(key=lambda p: _value(comparison, p, workload, TTFT_P90) or float("inf"))
    rows = [(Cell(p), *(_cell(comparison, p, workload, m) for m in measures)) for p in policies]
    headings = ("policy", *(_headed(m) for m in measures))
    return Table(f"{title}: {workload}", headings, tuple(rows), _seeds(comparison), detail)


def published(comparison: Comparison) -> Table:
    """The reference workload beside what was published for the same rule."""
    rows = []
    measures = (OUTPUT, TTFT_MEAN, TTFT_P90, QUEUE)
    for policy, theirs in PUBLISHED.items():
        if not comparison.cell(policy, REFERENCE):
            continue
        cells = [Cell(policy)]
        for measure in measures:
            value: float = getattr(theirs, measure.name)
            cells += [_cell(comparison, policy, REFERENCE, measure, mark=False), Cell(shown(value, measure.unit))]
        rows.append(tuple(cells))
    headings = chain.from_iterable((_headed(measure), "published") for measure in measures)
    return Table("The reference benchmark, beside the published figures", ("policy", *headings), tuple(rows))


def checks(rows: Sequence[Row]) -> Table:
    """What must hold, and what explains it."""
    return Table(
        "What must hold",
        ("", "value", "unit", "budget", "within", "beside", "its value"),
        tuple(_check(row) for row in rows),
        "Without a budget: told, not held.",
        worded=("unit", "within", "beside"),
    )


def _check(row: Row) -> tuple[Cell, ...]:
    within = row["within"]
    return (
        Cell(row["name"]),
        Cell(_figure(row["value"])),
        Cell(row["unit"]),
        Cell(_figure(row["budget"])),
        Cell({True: "yes", False: "no", None: ""}[within], bad=within is False),
        Cell(row["peer"] or ""),
        Cell(_figure(row["peer_value"])),
    )


def shown(value: float | None, unit: str) -> str:
    """A figure as people read it, without its unit unless that changes with its size."""
    if value is None:
        return "-"
    if unit == "ms":
        return f"{value * 1000:.1f}"
    if unit == "s":
        return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    if unit == "share":
        return f"{value * 100:.1f} %"
    if unit == "tokens/s":
        return f"{value:,.0f}"
    return f"{value:,.2f}"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _headed(measure: Measure) -> str:
    return measure.heading if measure.unit in {"share", "ratio"} else f"{measure.heading}, {measure.unit}"


def _value(comparison: Comparison, policy: str, workload: str, measure: Measure) -> float | None:
    found = comparison.median(policy, workload, measure)
    return found.value if found is not None else None


def _cell(comparison: Comparison, policy: str, workload: str, measure: Measure, *, mark: bool = True) -> Cell:
    found = comparison.median(policy, workload, measure)
    if found is None:
        return Cell("-")
    best = comparison.best(workload, measure) if mark and measure not in UNRANKED else None
    return Cell(shown(found.value, measure.unit), _range(found, measure), best is not None and best[1] == found.value)


def _range(found: Median, measure: Measure) -> str:
    low, high = (shown(value, measure.unit) for value in (found.low, found.high))
    return f"{low} – {high}" if low != high else ""


def _seeds(comparison: Comparison) -> str:
    return f"Medians over the seeds {', '.join(map(str, comparison.seeds))}." if len(comparison.seeds) > 1 else ""
