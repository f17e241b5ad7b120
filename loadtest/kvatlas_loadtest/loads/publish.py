"""A document made into its report: the tables on the terminal, the rows as JSON, the page as HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from kvatlas_loadtest.baselines.grids import GRIDS
from kvatlas_loadtest.bench.rows import Row
from kvatlas_loadtest.loads import report
from kvatlas_loadtest.loads.checks import check, is_variant
from kvatlas_loadtest.loads.comparison import Comparison
from kvatlas_loadtest.loads.document import Document
from kvatlas_loadtest.loads.terminal import show
from kvatlas_loadtest.loads.tuning import tuned

TITLE = "KV Atlas load test"


def publish(document: Document, console: Console, *, rows_to: Path | None, page_to: Path | None) -> list[Row]:
    """Returns the rows. Raises `OSError`, and `ImportError` where there is no matplotlib for the page."""
    runs, best_settings = tuned(document.figures, GRIDS)
    rows = check(runs, whole=document.whole) if document.simulated else []
    ranked = Comparison([run for run in runs if not is_variant(run.policy)])
    variants = Comparison([run for run in runs if is_variant(run.policy)])
    tables = report.tables(ranked) if ranked.runs else []
    if variants.runs:
        tables += [report.one_workload(variants, w, title="Variants", detail=False) for w in variants.workloads]
    checked = [report.checks(rows)] if rows else []
    if page_to is not None:
        facts = document.facts | {f"best of {policy}": text for policy, text in best_settings.items()}
        _write_page(facts, page_to, ranked, checked, tables)
    if rows_to is not None:
        rows_to.parent.mkdir(parents=True, exist_ok=True)
        rows_to.write_text(json.dumps(rows, indent=1) + "\n")
    parts = [table for table in tables if len(ranked.workloads) < 2 or not table.detail]
    show(console, [*parts, *checked])
    return rows


def _write_page(
    facts: Mapping[str, str], path: Path, ranked: Comparison, checked: list[report.Table], tables: list[report.Table]
) -> None:
    from kvatlas_loadtest.loads.page import page  # with what it draws with, which is an extra
    from kvatlas_loadtest.loads.plots import plots

    first = tables[:2] if len(ranked.workloads) > 1 else tables[:1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        page(
            title=TITLE,
            facts=facts,
            leading=[*first, *checked],
            plots=plots(ranked),
            rest=tables[len(first) :],
        ),
        encoding="utf-8",
    )
