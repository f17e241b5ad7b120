"""An engine's record in the store: whatever it holds comes back, and what is none is told from one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from kvatlas_common.fleet import Adapter, EngineView, Health, Sync
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.match import Kind
from kvatlas_indexer.core.records import (
    EngineRecord,
    NamingRecord,
    PlaceRecord,
    RuleRecord,
    StreamRecord,
    decode_record,
    encode_record,
)

numbers = st.integers(1, 2**32 - 1)
times = st.floats(0, 2e9)
doubts = st.lists(st.tuples(numbers, times), max_size=3)
places = st.builds(
    lambda group, medium, live, doubts: PlaceRecord(
        group, medium, live, [n for n, _ in doubts], [t for _, t in doubts]
    ),
    st.integers(0, 63),
    st.sampled_from([str(medium) for medium in Medium]),
    numbers,
    doubts,
)
records = st.builds(
    EngineRecord,
    engine=st.sampled_from(["10.0.0.1:8000", "[fe80::1]:8000/dp3", "engine.local:80"]),
    epoch=st.integers(0, 2**31),
    url=st.text(max_size=20),
    models=st.lists(st.text(max_size=10), max_size=3),
    adapters=st.lists(st.builds(Adapter, st.text(max_size=5), st.none() | st.text(max_size=5)), max_size=2),
    root=st.none() | st.text(max_size=10),
    health=st.sampled_from(Health),
    profile=st.none() | st.text(max_size=10),
    sync=st.sampled_from(Sync),
    places=st.lists(places, max_size=3),
    rules=st.lists(st.builds(RuleRecord, st.integers(0, 9), st.none() | st.text(max_size=9), st.none()), max_size=2),
    stream=st.builds(StreamRecord, st.booleans(), st.text(max_size=9), st.none() | times, st.none() | times),
    naming=st.builds(NamingRecord, st.booleans(), st.none() | st.text(max_size=9), st.booleans(), st.booleans()),
)

PLAIN = EngineRecord(
    engine="10.0.0.1:8000",
    epoch=3,
    url="http://10.0.0.1:8000",
    models=["m"],
    adapters=[],
    root=None,
    health=Health.READY,
    profile="p",
    profile_verified=True,
    block_size=16,
    sync=Sync.INEXACT,
    inexact_reason="messages 3..4 lost",
    max_model_len=8192,
    kv_tokens=65_536,
    heard=True,
    drop_last_blocks=0,
    places=[PlaceRecord(0, "gpu", 7, [3, 5], [1.0, 2.0]), PlaceRecord(1, "cpu", 9)],
    rules=[RuleRecord(0, "full_attention", None), RuleRecord(1, "sliding_window", 128), RuleRecord(2, "mamba", None)],
    stream=StreamRecord(True, "", 1.0, None),
    naming=NamingRecord(True, "p", True, False),
)


@given(records)
def test_what_was_written_is_read(record: EngineRecord) -> None:
    assert decode_record(encode_record(record)) == record


def test_what_a_lookup_needs_of_it() -> None:
    record = decode_record(encode_record(PLAIN))
    assert record.view() == EngineView(
        EngineId("10.0.0.1:8000"),
        "http://10.0.0.1:8000",
        models=frozenset({"m"}),
        health=Health.READY,
        profile="p",
        profile_verified=True,
        block_size=16,
        sync=Sync.INEXACT,
        inexact_reason="messages 3..4 lost",
        max_model_len=8192,
        kv_tokens=65_536,
    )
    assert record.slot_numbers() == {3, 5, 7, 9}
    assert [rule.kind for rule in record.group_rules().values()] == [Kind.FULL, Kind.WINDOW, Kind.UNKNOWN]


def changed(**fields: object) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(PLAIN) | fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        changed(engine="no port"),
        changed(sync="almost"),
        changed(places=[{"group": 0, "medium": "tape", "live": 1}]),
        changed(epoch="one"),
        encode_record(PLAIN)[:-20],
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="engine record"):
        decode_record(data)


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert decode_record(changed(colour="blue")) == PLAIN


def test_an_engine_lives_on_while_it_neither_restarts_nor_is_cleared() -> None:
    def with_live(number: int, doubts: list[int]) -> EngineRecord:
        return structs.replace(PLAIN, places=[PlaceRecord(0, "gpu", number, doubts, [1.0] * len(doubts))])

    before = with_live(7, [])
    started = structs.replace(before, stream=StreamRecord(True, "", 1.0, 100.0))
    assert before.lives_on_in(with_live(8, [7]))  # put in doubt
    assert before.lives_on_in(started)
    assert not before.lives_on_in(with_live(8, []))
    assert not before.lives_on_in(structs.replace(before, epoch=4))
    assert not started.lives_on_in(structs.replace(started, stream=StreamRecord(True, "", 1.0, 101.0)))
    assert structs.replace(before, places=[]).lives_on_in(before)
