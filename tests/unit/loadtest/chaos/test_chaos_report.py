"""The bars, and how a run is told: as rows, as tables, in the document."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kvatlas_loadtest.chaos.__main__ import DOCUMENT
from kvatlas_loadtest.chaos.books import Figures
from kvatlas_loadtest.chaos.plan import schedule
from kvatlas_loadtest.chaos.report import HEADINGS, SECTION, Recovery, Result, cells, markdown, rows
from kvatlas_loadtest.sections import inserted

GOOD = Figures(requests=100, precise=0.97, cached=0.9, first_byte_p50_s=0.02, slowest_s=0.3)
UNDISTURBED = Figures(requests=200, precise=1.0, cached=0.91)


def result(name: str = "kill-owner", *, replay: bool = True, **changed: Any) -> Result:
    (fault,) = schedule(0, replay=replay, redis=True, only=[name])
    good = Result(
        fault, (Recovery("it is back", 1.2),), GOOD, UNDISTURBED, sync={"a": "exact", "b": "exact", "c": "inexact"}
    )
    return replace(good, **changed)


def test_what_is_good_breaks_nothing() -> None:
    for replay in (True, False):
        assert result(replay=replay, kept=1.0).broken() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recoveries": (Recovery("back", 1.0), Recovery("again", None))}, "not exact and right after: again"),
        ({"recoveries": (Recovery("back", 5.1),)}, "only after 5.1 s exact and right after: back"),
        ({"figures": replace(GOOD, failed=2, failures={"status 502": 2})}, "2 requests failed: {'status 502': 2}"),
        ({"kept": 0.9}, "10.0% of what was known"),
        ({"troubles": ("before the fault: wrong",)}, "before the fault: wrong"),
    ],
)
def test_each_bar_can_break(changed: dict[str, Any], said: str) -> None:
    (broken,) = result(**changed).broken()
    assert broken.startswith(said)


def test_cut_streams_and_fallbacks_break_nothing() -> None:
    assert result(figures=replace(GOOD, cut=7, precise=0.1, cached=0.2, slowest_s=9.0)).broken() == []


def test_the_cached_share_is_barred_where_nothing_is_lost_but_time() -> None:
    low = replace(GOOD, cached=UNDISTURBED.cached - 0.021)
    assert len(result("rolling-restart", figures=low).broken()) == 1
    assert result("rolling-restart", figures=replace(GOOD, cached=UNDISTURBED.cached - 0.019)).broken() == []
    assert len(result("rolling-restart", figures=replace(GOOD, cached=math.nan)).broken()) == 1
    assert result("kill-engine", figures=low).broken() == []
    assert result("rolling-restart", replay=False, figures=low).broken() == []
    (alone,) = schedule(0, replay=True, redis=False, only=["rolling-restart"])
    assert result("rolling-restart", fault=alone, figures=low).broken() == [], "one indexer cannot stand in for itself"


def test_without_replay_exactness_is_asked_only_where_no_event_can_be_lost() -> None:
    assert result("kill-router", replay=False).must_be_exact
    assert not result("lose-frames", replay=False).must_be_exact
    (said,) = result("lose-frames", replay=False, recoveries=(Recovery("over", None),)).broken()
    assert said.startswith("not honest after: over")


def test_the_longest_recovery_counts_and_one_that_did_not_come_counts_most() -> None:
    both = (Recovery("first", 0.4), Recovery("second", 2.0))
    assert result(recoveries=both).exact_after_s == 2.0
    assert result(recoveries=(*both, Recovery("third", None))).exact_after_s is None
    assert result(recoveries=()).exact_after_s is None


def test_rows_have_the_shape_of_the_bench() -> None:
    found = rows([result("rolling-restart"), result(replay=False, kept=0.999)], elsewhere=["a traceback"])
    assert all(list(row) == ["name", "value", "unit", "budget", "within", "peer", "peer_value"] for row in found)
    by_name = {row["name"]: row for row in found}
    assert len(by_name) == len(found)
    assert by_name["chaos_replay_rolling_restart_exact_after_s"]["within"] is True
    cached = by_name["chaos_replay_rolling_restart_cached_share"]
    assert (cached["value"], cached["budget"], cached["within"], cached["peer_value"]) == (0.9, 0.89, True, 0.91)
    assert by_name["chaos_noreplay_kill_owner_kept_share"]["within"] is True
    assert by_name["chaos_noreplay_kill_owner_cached_share"]["within"] is None
    assert by_name["chaos_noreplay_kill_owner_honest_after_s"]["budget"] == 5
    assert by_name["chaos_other_bars_broken"]["within"] is False


def test_a_row_without_a_value_is_not_within_its_budget() -> None:
    (row,) = (r for r in rows([result(recoveries=(Recovery("x", None),))]) if r["name"].endswith("exact_after_s"))
    assert (row["value"], row["within"]) == (None, False)


def test_cells_are_told_for_every_heading() -> None:
    told = dict(zip(HEADINGS, cells(result(kept=0.99)), strict=True))
    assert told["fault"] == "kill-owner"
    assert told["right again after"] == "1.2 s"
    assert told["cached"] == "90.0 %"
    assert told["engines"] == "2 exact, 1 inexact, kept 99%"


def test_the_tables_say_what_was_run_and_what_broke() -> None:
    text = markdown([result(), result(replay=False, figures=replace(GOOD, failed=1))], "120 s on 2 cores.")
    assert text.startswith("120 s on 2 cores.")
    assert text.index("### With replay") < text.index("### Without replay")
    assert "- without replay, kill-owner: 1 requests failed" in text


def test_the_page_has_a_place_for_them() -> None:
    assert "the tables" in inserted(DOCUMENT.read_text(), SECTION, "the tables")
