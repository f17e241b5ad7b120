"""What a simulated engine tells and lets be broken from outside, where it was started with `--debug`.

A checker of the index needs the truth, and the truth is the engine's own block table: `GET /debug/block_table` answers

    {"ranks": [{"rank": 0, "next_seq": 17, "blocks": {"1234": 1, ...}, "arrivals": {"1234": 9, ...}}]}

with block keys in decimal, how many copies of each are held at that moment, and a number for each that stays as long as
the block is held without a break: it tells one that was evicted and came back. Events of the step under way are not
published yet: two tables a step apart tell what is settled. `POST /debug/faults` takes `publisher.Faults` as JSON
(`{"rank": 0, "drop": 3, "replay": "silent"}`); what is left out is put back to normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvatlas_loadtest.publisher import Faults, ReplayFault
from kvatlas_loadtest.rank import EngineRank

FAULTS_MAX = 1_000_000


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    rank: int = 0
    drop: int = 0
    duplicate: int = 0
    swap: int = 0
    replay: ReplayFault = ReplayFault.NONE


def block_tables(ranks: Sequence[EngineRank]) -> bytes:
    """JSON; see above."""
    tables = [
        {
            "rank": rank.number,
            "next_seq": rank.publisher.next_seq if rank.publisher else 0,
            "blocks": rank.core.copies(),
            "arrivals": rank.core.arrivals(),
        }
        for rank in ranks
    ]
    return msgspec.json.encode({"ranks": tables})


def set_faults(ranks: Sequence[EngineRank], body: bytes) -> dict[str, Any]:
    """Raises `ValueError` for what is no fault, or no rank that publishes events."""
    wanted = msgspec.json.decode(body, type=_Wanted)
    publisher = ranks[wanted.rank].publisher if 0 <= wanted.rank < len(ranks) else None
    if publisher is None:
        raise ValueError(f"rank {wanted.rank} publishes no events")
    for name in ("drop", "duplicate", "swap"):
        if not 0 <= getattr(wanted, name) <= FAULTS_MAX:
            raise ValueError(f"{name} is not within 0..{FAULTS_MAX}")
    publisher.faults = Faults(wanted.drop, wanted.duplicate, wanted.swap, wanted.replay)
    return {"success": True}
