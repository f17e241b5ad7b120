"""Recorded loads in Mooncake's JSONL format: one request a line, its prompt as hashes of blocks of 512 tokens.

`{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}`: milliseconds since the
trace began, tokens, tokens, and a number per block of the prompt (the last may be partial). Equal numbers are equal
blocks after equal beginnings, so a block becomes a segment named after its number.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvatlas_loadtest.loads.arrivals import Arrival, Segment

BLOCK_TOKENS = 512


class BadTrace(ValueError):
    """A line that cannot be used."""


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, scale: float = 1.0) -> list[Arrival]:
    """The first `scale` of a trace's time. Raises `BadTrace`, which names the line, and `OSError`."""
    with path.open("rb") as lines:
        arrivals = parsed(lines)
    if not arrivals:
        raise BadTrace(f"{path}: no requests")
    ends_s = arrivals[-1].at_s * scale
    return [arrival for arrival in arrivals if arrival.at_s <= ends_s]


def parsed(lines: Iterable[bytes]) -> list[Arrival]:
    """In the order of their times. Blank lines are passed over."""
    arrivals = [_arrival(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _arrival(line: bytes, number: int) -> Arrival:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as error:
        raise BadTrace(f"line {number}: {error}") from None
    blocks = -(-read.input_length // BLOCK_TOKENS)
    if read.timestamp < 0 or read.input_length < 1 or read.output_length < 0 or len(read.hash_ids) != blocks:
        raise BadTrace(
            f"line {number}: {read.input_length} input tokens are {blocks} blocks of {BLOCK_TOKENS}, "
            f"and {len(read.hash_ids)} hashes are given; times and lengths are not below 0"
        )
    last = read.input_length - (blocks - 1) * BLOCK_TOKENS
    prompt = tuple(
        Segment(hash_id, last if place == blocks - 1 else BLOCK_TOKENS) for place, hash_id in enumerate(read.hash_ids)
    )
    return Arrival(read.timestamp / 1000, prompt, max(1, read.output_length))
