"""Events on the wire: each version's form to the letter, and readable by the project's own decoder."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import AllBlocksCleared, BlockRemoved, BlockStored
from kvatlas_common.words import Medium
from kvatlas_loadtest.events import EventEncoder, WireVersion
from kvatlas_loadtest.kv_events import Cleared, Removed, Stored, key_of

STORED = Stored([11, 12], 10, [1, 2, 3, 4], [("sales", "salt"), ("sales",)], "sales")
PLAIN = Stored([11], None, [1, 2], [None])
MAP_BASE = {"parent_block_hash": 10, "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": 3, "medium": "GPU"}
MAP_GROUPS = {
    "lora_name": "sales",
    "extra_keys": [["sales", "salt"], ["sales"]],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
STORED_MAP = {"type": "BlockStored", "block_hashes": [11, 12], **MAP_BASE, **MAP_GROUPS}
REMOVED_MAP = {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "group_idx": 0}
ARRAY = ["BlockStored", [11, 12], 10, [1, 2, 3, 4], 2, 3]
GROUPS = [[["sales", "salt"], ["sales"]], 0, "full_attention"]
FORMS: dict[WireVersion, tuple[Any, Any, Any]] = {
    WireVersion.V0_10: (ARRAY, ["BlockRemoved", [11]], ["AllBlocksCleared"]),
    WireVersion.V0_12: ([*ARRAY, "GPU"], ["BlockRemoved", [11], "GPU"], ["AllBlocksCleared"]),
    WireVersion.V0_16: ([*ARRAY, "GPU", "sales"], ["BlockRemoved", [11], "GPU"], ["AllBlocksCleared"]),
    WireVersion.V0_22: (
        [*ARRAY, "GPU", "sales", *GROUPS],
        ["BlockRemoved", [11], "GPU", 0],
        ["AllBlocksCleared"],
    ),
    WireVersion.V0_27: (STORED_MAP, REMOVED_MAP, {"type": "AllBlocksCleared"}),
    WireVersion.V0_32: (STORED_MAP, REMOVED_MAP, {"type": "AllBlocksCleared"}),
}


def encoder(version: WireVersion) -> EventEncoder:
    return EventEncoder(version, block_size=2, lora_ids=(("other", 1), ("sales", 3)))


@pytest.mark.parametrize("version", WireVersion)
def test_the_form_of_each_version(version: WireVersion) -> None:
    payload = encoder(version).batch([STORED, Removed(11), Cleared()], ts=5.5, rank=2)
    assert msgspec.msgpack.decode(payload) == [5.5, list(FORMS[version]), 2]


@pytest.mark.parametrize("version", WireVersion)
def test_the_projects_decoder_reads_it(version: WireVersion) -> None:
    batch = decode_batch(encoder(version).batch([STORED, PLAIN, Removed(11), Cleared()], ts=5.5, rank=2))
    stored, plain, removed, cleared = batch.events
    assert (batch.ts, batch.rank, batch.rejected) == (5.5, 2, ())
    assert isinstance(stored, BlockStored)
    assert (list(stored.keys), stored.parent, stored.token_ids(), stored.block_size) == ([11, 12], 10, [1, 2, 3, 4], 2)
    assert (stored.medium, stored.group, stored.lora_id) == (Medium.GPU, 0, 3)
    if stored.says_extra_keys:
        assert stored.extra_keys() == [["sales", "salt"], ["sales"]]
        assert stored.kind == "full_attention"
    assert isinstance(plain, BlockStored)
    assert (plain.parent, plain.lora_id, plain.lora_name) == (None, None, None)
    assert isinstance(removed, BlockRemoved)
    assert list(removed.keys) == [11]
    assert isinstance(cleared, AllBlocksCleared)


def test_hashes_may_be_whole() -> None:
    whole = bytes(range(32))
    batch = decode_batch(encoder(WireVersion.V0_32).batch([Removed(whole)], ts=0.0))
    removed = batch.events[0]
    assert isinstance(removed, BlockRemoved)
    assert list(removed.keys) == [key_of(whole)] == [0x18191A1B1C1D1E1F]


def test_the_rank_may_be_left_out() -> None:
    assert msgspec.msgpack.decode(encoder(WireVersion.V0_10).batch([], ts=1.0, rank=None)) == [1.0, []]
