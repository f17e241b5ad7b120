"""What becomes of event messages on a bad day: lost, repeated, late; and nothing else, and all from the seed."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kvatlas_loadtest.chaos.wires import FrameFaults, Misfortune

SENT = [[b"topic", bytes([number]), b"payload"] for number in range(200)]


def passed(faults: FrameFaults, seed: int = 1) -> tuple[list[int], Misfortune]:
    """The numbers that come out, and what they went through."""
    frames = Misfortune(seed)
    frames.faults = faults
    out = list(itertools.chain.from_iterable(frames.after(message) for message in SENT))
    frames.faults = FrameFaults()
    out += frames.after([b"topic", bytes([200]), b"payload"])  # what is held back comes with the next
    assert all(message in SENT or message[1] == bytes([200]) for message in out)
    return [message[1][0] for message in out], frames


def test_on_a_good_day_all_come_in_order() -> None:
    out, frames = passed(FrameFaults())
    assert out == list(range(201))
    assert frames.counts.hit == 0


def test_lost_ones_do_not_come_and_the_others_keep_their_order() -> None:
    out, frames = passed(FrameFaults(lost=0.3))
    assert len(out) == 201 - frames.counts.lost
    assert frames.counts.lost == pytest.approx(60, abs=20)
    assert out == sorted(set(out))


def test_repeated_ones_come_twice_in_a_row() -> None:
    out, frames = passed(FrameFaults(twice=0.3))
    counted = Counter(out)
    assert sum(n == 2 for n in counted.values()) == frames.counts.twice > 30
    assert out == sorted(counted.elements())


def test_late_ones_come_right_after_the_one_that_followed_them() -> None:
    out, frames = passed(FrameFaults(late=0.3))
    assert sorted(out) == list(range(201))
    assert sum(a > b for a, b in itertools.pairwise(out)) == frames.counts.late > 30
    assert all(abs(place - number) <= 1 for place, number in enumerate(out))


def test_the_seed_decides() -> None:
    everything = FrameFaults(lost=0.2, twice=0.2, late=0.2)
    assert passed(everything, 5)[0] == passed(everything, 5)[0] != passed(everything, 6)[0]
