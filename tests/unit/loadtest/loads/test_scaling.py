from __future__ import annotations

from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Segment
from kvatlas_loadtest.loads.scaling import scaled


def test_slower_and_shorter() -> None:
    turn = Arrival(2.0, (Segment(1, 100), Answer(0), Segment(2, 3)), 40, "s", "salt", after=0, think_s=1.0, stage=1)
    (found,) = scaled([turn], slower=2.0, tokens=0.1)
    assert found == Arrival(4.0, (Segment(1, 10), Answer(0), Segment(2, 1)), 4, "s", "salt", 0, 2.0, 1)
    assert scaled([turn]) == [turn]
