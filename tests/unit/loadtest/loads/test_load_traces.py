"""Mooncake's JSONL: what is read, and what is said of a line that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas_loadtest.loads.arrivals import Segment
from kvatlas_loadtest.loads.traces import BadTrace, parsed, read_trace

SAMPLE = Path(__file__).parents[3] / "data" / "loads" / "mooncake-sample.jsonl"
LINE = b'{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}'


def test_a_line_is_an_arrival_whose_blocks_are_segments() -> None:
    (arrival,) = parsed([LINE])
    assert arrival.at_s == 27.482
    assert arrival.prompt == (Segment(46, 512), Segment(47, 512), Segment(48, 76))
    assert arrival.output_tokens == 52


def test_lines_are_sorted_by_time_and_blank_ones_passed_over() -> None:
    earlier = LINE.replace(b"27482", b"1000")
    assert [arrival.at_s for arrival in parsed([LINE, b"\n", earlier])] == [1.0, 27.482]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "line 2"),
        (b'{"timestamp": 1}', "input_length"),
        (LINE.replace(b", 48]", b"]"), "2 hashes are given"),
        (LINE.replace(b"27482", b"-1"), "not below 0"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: bytes, why: str) -> None:
    with pytest.raises(BadTrace, match="line 2") as caught:
        parsed([LINE, line])
    assert why in str(caught.value)


def test_the_sample_can_be_read_and_shortened() -> None:
    whole = read_trace(SAMPLE)
    assert len(whole) > 100
    half = read_trace(SAMPLE, 0.5)
    assert half == whole[: len(half)]
    assert 0 < len(half) < len(whole)


def test_an_empty_trace_is_no_load(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(BadTrace, match="no requests"):
        read_trace(tmp_path / "empty.jsonl")
