"""Tables, and what they are shown as: on the terminal and in the page."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from kvatlas_loadtest.loads import report
from kvatlas_loadtest.loads.__main__ import main
from kvatlas_loadtest.loads.comparison import TTFT_P90, Comparison
from kvatlas_loadtest.loads.document import BadDocument, Document, load, merged
from kvatlas_loadtest.loads.page import page
from kvatlas_loadtest.loads.plots import Plot, plots
from kvatlas_loadtest.loads.publish import publish
from kvatlas_loadtest.loads.report import Cell, Table, shown
from tests.unit.loadtest.loads.report_kit import told

RUNS = [
    told(policy, workload, seed, ttft_s=ttft * seed)
    for policy, ttft in (("precise", 0.2), ("llm-d", 0.5), ("llm-d:prefix=5", 0.4), ("of <our> own", 9.0))
    for workload in ("reference", "hot-prefix")
    for seed in (1, 2)
]
REFERENCE = tuple(run for run in RUNS if run.workload == "reference")
"""What is drawn: each workload more is two seconds of drawing."""

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.01234, "s", "0.012"), (1.234, "s", "1.23"), (92.55, "s", "92.5"), (0.987, "share", "98.7 %"), (None, "s", "-"),
     (8730.4, "tokens/s", "8,730"), (0.0123, "ms", "12.3"), (1.5, "ratio", "1.50")],
)  # fmt: skip
def test_figures_as_people_read_them(value: float | None, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_one_measure_over_workloads() -> None:
    table = report.over_workloads(Comparison(RUNS), TTFT_P90)
    assert table.headings == ("policy", "reference", "hot-prefix")
    assert table.rows[0] == (Cell("precise"), *[Cell("0.300", "0.200 – 0.400", best=True)] * 2)
    assert [row[0].text for row in table.rows] == ["precise", "llm-d", "llm-d:prefix=5", "of <our> own"]


def test_a_workload_has_its_best_first_and_no_column_of_nothing() -> None:
    table = report.one_workload(Comparison([*RUNS, told("random", ttft_s=0.01, piled_up=0.5)]), "hot-prefix")
    assert [row[0].text for row in table.rows] == ["precise", "llm-d:prefix=5", "llm-d", "of <our> own"]
    assert "failed" not in table.headings
    assert "piled up" not in table.headings
    assert "load max/mean" in table.headings


def test_beside_the_published_figures() -> None:
    table = report.published(Comparison([told("random", ttft_s=40.0), told("smg")]))
    assert table.headings[:3] == ("policy", "output, tokens/s", "published")
    (row,) = table.rows
    texts = [cell.text for cell in row]
    assert texts[:7] == ["random", "1,000", "4,429", "40.0", "47.0", "40.0", "92.6"]


def test_the_page_escapes_all_texts_and_fetches_nothing() -> None:
    evil = "<script>alert('x')</script>\"&"
    table = Table(evil, ("policy", evil), ((Cell(evil), Cell(evil, evil, best=True)),), note=evil)
    html = page(title=evil, facts={evil: evil}, leading=[table], plots=[Plot(evil, evil, PNG, PNG)], rest=[table])
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 12
    assert base64.b64encode(PNG).decode() in html
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in html


def test_figures_are_drawn_on_light_and_on_dark_ground() -> None:
    found = list(plots(Comparison(REFERENCE)))
    assert len(found) == 7
    assert all(image.startswith(PNG) for plot in found for image in (plot.light, plot.dark))
    assert all(plot.light != plot.dark for plot in found)
    assert len({plot.title for plot in found}) == 7


def test_what_is_not_there_is_not_drawn() -> None:
    found = list(plots(Comparison([told("precise", queue=(), rates=(), engines={}, ttft=None, ttft_quantiles=())])))
    assert len(found) == 5


def test_documents_are_written_read_and_laid_side_by_side(tmp_path: Path) -> None:
    one = Document(tuple(RUNS[:2]), simulated=True, whole=True, facts={"seeds": "1", "machine": "m"})
    other = Document(tuple(RUNS[2:3]), facts={"seeds": "2", "machine": "m"})
    one.save(tmp_path / "a" / "one.json")
    assert load(tmp_path / "a" / "one.json") == one
    both = merged([one, other])
    assert both == Document(tuple(RUNS[:3]), facts={"seeds": "1; 2", "machine": "m"})
    (tmp_path / "bad.json").write_text('{"figures": 3}')
    with pytest.raises(BadDocument, match=r"bad\.json.*figures"):
        load(tmp_path / "bad.json")


def test_the_report_of_a_simulated_test(tmp_path: Path) -> None:
    out = Console(file=io.StringIO(), width=200)
    document = Document(REFERENCE, simulated=True, facts={"command": "<x>"})
    rows = publish(document, out, rows_to=tmp_path / "rows.json", page_to=tmp_path / "page.html")
    assert {"name", "value", "unit", "budget", "within", "peer", "peer_value"} == set(rows[0])
    assert (tmp_path / "rows.json").read_text().startswith("[\n")
    html = (tmp_path / "page.html").read_text()
    assert "&lt;x&gt;" in html
    assert "of &lt;our&gt; own" in html
    assert publish(Document(tuple(RUNS)), out, rows_to=None, page_to=None) == []


def test_the_command_reads_what_it_wrote_and_says_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Document(tuple(RUNS), simulated=True).save(tmp_path / "runs.json")
    assert main(["report", str(tmp_path / "runs.json"), "--rows", str(tmp_path / "rows.json")]) == 0
    assert "What must hold" in capsys.readouterr().out
    assert (tmp_path / "rows.json").exists()
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
