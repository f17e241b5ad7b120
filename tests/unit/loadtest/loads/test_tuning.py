from __future__ import annotations

from kvatlas_loadtest.loads.tuning import tuned
from tests.unit.loadtest.loads.report_kit import told

GRIDS = {"a": ("a", "a:x=1", "a:x=2"), "b": ("b", "b:x=1"), "c": ("c",), "d": ("d", "d:x=1")}


def test_the_best_setting_over_all_workloads_stands_beside_the_default() -> None:
    times = {"a": (2.0, 2.0), "a:x=1": (0.5, 9.0), "a:x=2": (1.0, 2.0), "b": (1.0, 1.0), "b:x=1": (1.0, 1.1)}
    times |= {"c": (1.0, 1.0), "d:x=1": (0.1, 0.1)}
    runs = [told(p, w, ttft_s=t) for p, both in times.items() for w, t in zip(("x", "y"), both, strict=True)]
    compared, chosen = tuned(runs, GRIDS)
    assert list(dict.fromkeys(run.policy for run in compared)) == ["a", "a tuned", "b", "c", "d:x=1"]
    assert [run.ttft.p90 for run in compared if run.policy == "a tuned" and run.ttft] == [1.0, 2.0]
    assert chosen == {"a": "a tuned is a:x=2", "b": "its defaults"}
