"""Curves are read off their two ends; a claim that does not hold is said to be one."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvatlas_loadtest.bench.curves.__main__ import DOCUMENT, main
from kvatlas_loadtest.bench.curves.curve import FLAT, LIKE_IT, SECTION, Claim, Column, Curve, markdown
from kvatlas_loadtest.sections import inserted


def curve(*columns: Column, points: dict[int, tuple[float | None, ...]]) -> Curve:
    return Curve("x", "Cost against blocks", "blocks", columns, points)


def test_a_curve_that_grows_with_its_size_is_told_by_how_much() -> None:
    column = Column("cost", "ms", Claim("with the blocks", grows=1.0))
    its = curve(column, points={64: (0.5,), 256: (1.0,), 8192: (48,)})
    assert its.readings() == [("cost: 128 times the blocks (64 to 8,192), 96 times the ms: with the blocks", True)]
    assert its.holds


def test_a_claim_that_does_not_hold_says_so() -> None:
    its = curve(Column("cost", "ms", Claim("not with blocks")), points={1: (1.0,), 512: (9.0,)})
    ((text, held),) = its.readings()
    assert not held
    assert text.endswith("9 times the ms: NOT: not with blocks (at most 2 times was allowed)")
    assert not its.holds


@pytest.mark.parametrize(
    ("claim", "size", "allowed"),
    [
        (Claim(""), 512, FLAT),
        (Claim("", grows_max=1.5), 512, 1.5),
        (Claim("", grows=1.0), 8, 8 * LIKE_IT),
        (Claim("", grows=0.1), 77, 7.7 * LIKE_IT),
        (Claim("", grows=0.1), 2, LIKE_IT),  # a tenth of so little is nothing
    ],
)
def test_how_much_growth_is_allowed(claim: Claim, size: float, allowed: float) -> None:
    assert claim.allowed(size) == pytest.approx(allowed)


def test_a_claim_may_begin_later_and_points_may_be_missing() -> None:
    few = Column("few hold", "ms", Claim("with those that match", since=8))
    its = curve(few, points={1: (0.1,), 8: (1.0,), 32: (None,), 512: (1.1,)})
    assert its.readings()[0][0].startswith("few hold: 64 times the blocks (8 to 512), 1.1 times")
    assert curve(few, points={8: (1.0,)}).readings() == [("few hold: not measured at two sizes", False)]


def test_the_page_has_a_table_and_the_readings_of_each_curve() -> None:
    columns = Column("cost", "ms", Claim("flat")), Column("memory", "MB", digits=0)
    its = curve(*columns, points={1: (1, None), 2000: (1, 7)})
    its.note = "By hand."
    assert markdown([its], "On nothing.").splitlines() == [
        "On nothing.",
        "",
        "### Cost against blocks",
        "",
        "By hand.",
        "",
        "| blocks | cost, ms | memory, MB |",
        "| ---: | ---: | ---: |",
        "| 1 | 1.00 | - |",
        "| 2,000 | 1.00 | 7 |",
        "",
        "- cost: 2,000 times the blocks (1 to 2,000), 1 times the ms: flat",
    ]
    assert "On nothing." in inserted(DOCUMENT.read_text(), SECTION, "On nothing.")


def test_a_curve_survives_the_way_from_its_process() -> None:
    its = curve(Column("cost", "ms", Claim("flat", since=3)), points={1: (1.0,), 2: (None,)})
    assert msgspec.json.decode(msgspec.json.encode(its), type=Curve) == its


def test_one_curve_is_measured_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "build" / "curves.json"
    assert main(["--quick", "--only", "memory_entries", "--json", str(written)]) in (0, 1)
    (its,) = json.loads(written.read_text())
    assert its["name"] == "memory_entries"
    assert [len(values) for _, values in its["points"]] == [2, 2]
    assert "bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--only", "nothing"], ["--write-docs", "--quick"], ["--write-docs", "--only", "x"]]
)
def test_what_makes_no_sense_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
