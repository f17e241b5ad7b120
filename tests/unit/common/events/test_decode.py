"""Every encoding an engine has used, and what becomes of bytes nobody meant for the decoder."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.events.decode import EVENTS_MAX, RANK_MAX, decode_batch, decode_seq, decode_topic
from kvatlas_common.events.types import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    MalformedBatch,
    Rejection,
    Topic,
)
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.index import KvIndex

CAPTURES = Path(__file__).parents[3] / "data" / "captures"
pack = msgspec.msgpack.encode


def batch(*events: Any, ts: Any = 1700000000.5, tail: tuple[Any, ...] = ()) -> EventBatch:
    return decode_batch(pack([ts, list(events), *tail]))


def only(*events: Any) -> Event:
    decoded = batch(*events)
    assert decoded.rejected == ()
    (event,) = decoded.events
    return event


def stored(event: Any) -> BlockStored:
    found = only(event)
    assert isinstance(found, BlockStored)
    return found


def removed(event: Any) -> BlockRemoved:
    found = only(event)
    assert isinstance(found, BlockRemoved)
    return found


# -- the table of encodings --------------------------------------------------------------------------------------------

TOKENS = list(range(4))
ARRAY_010 = ["BlockStored", [11, 12], 10, TOKENS, 2, None]
ARRAY_011 = [*ARRAY_010, "GPU"]
ARRAY_016 = [*ARRAY_011[:5], 7, "GPU", "ada"]
ARRAY_022 = ["BlockStored", [11, 12], 10, TOKENS, 2, None, "GPU", None, [["salt"], None], 1, "sliding_window", 256]
MAP_027 = {
    "type": "BlockStored",
    "block_hashes": [11, 12],
    "parent_block_hash": 10,
    "token_ids": TOKENS,
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [["salt"], None],
    "group_idx": 1,
    "kv_cache_spec_kind": "sliding_window",
    "kv_cache_spec_sliding_window": 256,
    "locality": "local",
}
MAP_032 = {**MAP_027, "ownership": None, "session_id": "s"}
SGLANG = ["BlockStored", [11, 12], 10, TOKENS, 2, None]


@pytest.mark.parametrize("event", [ARRAY_010, ARRAY_011, ARRAY_016, ARRAY_022, MAP_027, MAP_032, SGLANG])
def test_a_store_says_the_same_in_every_version(event: Any) -> None:
    found = stored(event)
    assert (list(found.keys), found.full, found.parent, found.parent_full) == ([11, 12], None, 10, None)
    assert (found.block_size, found.medium, found.token_ids(), found.token_count) == (2, Medium.GPU, TOKENS, 4)


def test_what_only_some_versions_say() -> None:
    old, adapter, grouped, mapped = map(stored, (ARRAY_010, ARRAY_016, ARRAY_022, MAP_032))
    assert (old.group, old.kind, old.window, old.says_extra_keys, old.extra_keys()) == (0, None, None, False, None)
    assert (adapter.lora_id, adapter.lora_name, adapter.says_extra_keys) == (7, "ada", False)
    for newer in (grouped, mapped):
        assert (newer.group, newer.kind, newer.window) == (1, "sliding_window", 256)
        assert newer.says_extra_keys
        assert newer.extra_keys() == [["salt"], None]


def test_extra_keys_that_are_none_are_not_extra_keys_left_out() -> None:
    said = stored([*ARRAY_016[:8], None])
    assert said.says_extra_keys
    assert said.extra_keys() is None


@pytest.mark.parametrize("length", [8, 16, 32])
def test_a_hash_of_bytes_is_known_by_its_last_eight(length: int) -> None:
    whole = bytes(range(1, length + 1))
    parent = bytes(reversed(whole))
    found = stored(["BlockStored", [whole], parent, TOKENS, 4, None])
    assert found.keys == [int.from_bytes(whole[-8:], "big")]
    assert (found.full, found.parent_full) == ([whole], parent)
    assert found.parent == int.from_bytes(parent[-8:], "big")
    assert removed(["BlockRemoved", [whole]]).keys == found.keys


def test_bytes_that_are_too_short_for_a_hash_are_refused() -> None:
    assert [r.rejection for r in batch(["BlockRemoved", [b"1234567"]]).rejected] == [Rejection.MALFORMED]


def test_whole_hashes_are_kept_only_where_every_hash_is_whole() -> None:
    assert stored(["BlockStored", [bytes(32), 5], None, TOKENS, 2, None]).full is None


def test_signed_hashes_are_the_same_64_bits() -> None:
    assert removed(["BlockRemoved", [-1, 3]]).keys == [2**64 - 1, 3]


@pytest.mark.parametrize("event", [["AllBlocksCleared"], {"type": "AllBlocksCleared"}, ["AllBlocksCleared", 1, 2]])
def test_a_clear(event: Any) -> None:
    assert only(event) == AllBlocksCleared()


@pytest.mark.parametrize(
    ("name", "medium"),
    [
        (None, Medium.GPU), ("GPU", Medium.GPU), ("gpu", Medium.GPU), ("CPU", Medium.CPU), ("cpu", Medium.CPU),
        ("STORAGE", Medium.STORAGE), ("DISK", Medium.STORAGE), ("REMOTE", Medium.REMOTE), ("CPU_PINNED", Medium.CPU),
    ],
)  # fmt: skip
def test_media(name: str | None, medium: Medium) -> None:
    assert removed(["BlockRemoved", [1], name]).medium is medium
    assert stored([*ARRAY_010, name]).medium is medium


def test_a_medium_nobody_knows_costs_its_event_and_puts_nothing_in_doubt() -> None:
    found = batch(["BlockRemoved", [1], "TAPE"], ["BlockRemoved", [2], "GPU"])
    assert [r.rejection for r in found.rejected] == [Rejection.UNKNOWN_MEDIUM]
    assert not found.rejected[0].lossy
    assert len(found.events) == 1


@pytest.mark.parametrize("tail", [(), (None,), (3,), (3, "later", {"field": 1})])
def test_the_rank_is_the_third_element_if_there_is_one(tail: tuple[Any, ...]) -> None:
    assert batch(tail=tail).rank == (3 if tail and tail[0] == 3 else None)


@pytest.mark.parametrize("rank", [-1, RANK_MAX + 1, 2**63])
def test_a_rank_out_of_range_is_no_batch(rank: int) -> None:
    with pytest.raises(MalformedBatch, match="data_parallel_rank"):
        batch(tail=(rank,))


@pytest.mark.parametrize("ts", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_time_that_is_none_is_no_batch(ts: float) -> None:
    with pytest.raises(MalformedBatch, match="ts"):
        batch(ts=ts)


def test_later_fields_are_ignored_in_both_forms() -> None:
    assert stored([*ARRAY_022, "local", None, {"deep": [1]}]).keys == [11, 12]
    assert stored({**MAP_032, "from_the_future": {"deep": [1]}}).keys == [11, 12]
    assert removed({"type": "BlockRemoved", "block_hashes": [1], "ownership": 3}).keys == [1]


def test_a_map_may_leave_out_what_has_a_default() -> None:
    needed = {k: MAP_027[k] for k in ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size")}
    found = stored(needed)
    assert (found.medium, found.group, found.says_extra_keys) == (Medium.GPU, 0, False)


def test_adapters_that_older_versions_and_sglang_name_by_text() -> None:
    assert stored([*ARRAY_010[:5], "ada"]).lora_name == "ada"
    assert stored([*ARRAY_010[:5], 3]).lora_id == 3


# -- one bad event costs that event ------------------------------------------------------------------------------------

BAD: dict[str, Any] = {
    "no array, no map": 5,
    "nil": None,
    "empty": [],
    "no type": {"block_hashes": [1]},
    "type is a number": [1, [1]],
    "too short": ["BlockStored", [1]],
    "hashes are text": ["BlockRemoved", ["a"]],
    "hashes are none": ["BlockRemoved", None],
    "a hash is a float": ["BlockRemoved", [1.5]],
    "block size is text": ["BlockStored", [1], None, [], "16", None],
    "block size is negative": ["BlockStored", [1], None, [], -1, None],
    "block size is absurd": ["BlockStored", [1], None, [], 1 << 40, None],
    "group is negative": ["BlockRemoved", [1], "GPU", -1],
    "group is absurd": ["BlockRemoved", [1], "GPU", 100_000],
    "window is zero": [*ARRAY_022[:11], 0],
    "medium is a number": ["BlockRemoved", [1], 3],
    "keys that are no text": {1: 2, "type": "BlockRemoved"},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_bad_event_costs_that_event(bad: Any) -> None:
    found = batch(["BlockRemoved", [1]], bad, ["AllBlocksCleared"])
    assert found.events == (BlockRemoved([1], Medium.GPU, 0), AllBlocksCleared())
    (rejected,) = found.rejected
    assert rejected.rejection is Rejection.MALFORMED
    assert rejected.lossy
    assert rejected.why


@pytest.mark.parametrize("unknown", [["BlockMoved", 1, {"a": 2}], {"type": "BlockMoved", "x": [1]}])
def test_an_unknown_type_costs_nothing_else_and_changes_nothing(unknown: Any) -> None:
    found = batch(["BlockRemoved", [1]], unknown, MAP_032)
    assert len(found.events) == 2
    assert [(r.rejection, r.lossy) for r in found.rejected] == [(Rejection.UNKNOWN_TYPE, False)]


def test_what_is_said_of_a_bad_event_is_short() -> None:
    assert len(batch(["B" * 10_000, 1]).rejected[0].why) < 300
    assert len(batch(["BlockRemoved", [1], "M" * 10_000]).rejected[0].why) < 300


def test_odd_shapes_are_legal() -> None:
    offload = stored(["BlockStored", [1, 2], None, [], 0, None, "CPU"])
    assert (offload.block_size, offload.token_ids(), offload.medium) == (0, [], Medium.CPU)
    window = stored(["BlockStored", [8], None, TOKENS * 3, 4, None, "GPU", None, None, 1, "sliding_window", 8])
    assert (window.token_count, len(window.keys)) == (12, 1)
    assert stored(["BlockStored", [], 5, TOKENS, 4, None]).keys == []


def test_token_ids_are_looked_at_only_when_asked_for() -> None:
    found = stored(["BlockStored", [1], None, "no tokens", 4, None])
    with pytest.raises(MalformedBatch, match="token_ids"):
        found.token_ids()
    with pytest.raises(MalformedBatch, match="extra_keys"):
        stored([*ARRAY_016, [["a"], 5]]).extra_keys()


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("kv@10.0.0.5@tiny", Topic("10.0.0.5", None, "tiny")),
        ("kv@10.0.0.5:8001@Qwen/Qwen3-32B", Topic("10.0.0.5", 8001, "Qwen/Qwen3-32B")),
        ("kv@engine-0.svc.local:80@a@b@c", Topic("engine-0.svc.local", 80, "a@b@c")),
        ("kv@[::1]:8000@m", Topic("[::1]", 8000, "m")),
        ("kv@[fd00::0:1]@m", Topic("[fd00::1]", None, "m")),
        ("kv@fd00:0:0:0:0:0:0:5@m", Topic("[fd00::5]", None, "m")),
    ],
)
def test_topics(text: str, topic: Topic) -> None:
    found = decode_topic(text.encode())
    assert found == topic
    engine = EngineId(f"{found.host}:{found.port or 8000}", 2)
    assert EngineId.parse(str(engine)) == engine


@pytest.mark.parametrize(
    "text",
    [
        "", "kv", "kv@", "kv@a", "kv@a@", "kv@@m", "xx@a@m", "kv@a:@m", "kv@a:0@m", "kv@a:65536@m", "kv@a:x@m",
        "kv@a b@m", "kv@a/dp1@m", "kv@a\n@m", "kv@[::1@m", "kv@[zz]@m", "kv@1:2:3@m", "kv@[::1]8000@m", "kv@a@m\n",
        "kv@a:\u0663@m", "kv@a@" + "m" * 600,
    ],
)  # fmt: skip
def test_what_is_no_topic_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(MalformedBatch, match="kv@<host>"):
        decode_topic(text.encode())


def test_sequence_frames() -> None:
    assert decode_seq(struct.pack(">Q", 2**64 - 1)) == 2**64 - 1
    for frame in (b"", b"1234567", b"123456789"):
        with pytest.raises(MalformedBatch, match="sequence"):
            decode_seq(frame)


# -- hostile bytes -----------------------------------------------------------------------------------------------------

TS = b"\xcb" + struct.pack(">d", 1.0)
HOSTILE = {
    "nothing": b"",
    "deep arrays": b"\x92" + TS + b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x92" + TS + b"\x91" + b"\x81\xa1a" * 100_000 + b"\xc0",
    "deep map keys": b"\x92" + TS + b"\x91" + b"\x81" * 100_000,
    "four billion events": b"\x92" + TS + b"\xdd\xff\xff\xff\xff",
    "four billion hashes": b"\x92" + TS + b"\x91\x92\xacBlockRemoved\xdd\xff\xff\xff\xff",
    "four gigabytes": b"\x92" + TS + b"\x91\xc6\xff\xff\xff\xff",
    "a map for a batch": pack({"ts": 1.0, "events": []}),
    "more events than a step can have": pack([1.0, [None] * (EVENTS_MAX + 1)]),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_hostile_payloads_are_malformed_batches(payload: bytes) -> None:
    with pytest.raises(MalformedBatch):
        decode_batch(payload)


@pytest.mark.parametrize(
    "raw",
    [b"\x81\x81\x01\x02\x03", b"\xd4\xff\x00", b"\xc7\x0c\xff" + b"\xff" * 12, b"\x91\xa2\xff\xff", b"\xc1"],
    ids=["a map as a key", "an extension", "a broken timestamp", "text that is none", "a byte never used"],
)
def test_hostile_events_leave_their_siblings(raw: bytes) -> None:
    payload = b"\x92" + TS + b"\x93" + pack(["AllBlocksCleared"]) + raw + pack(["AllBlocksCleared"])
    try:
        found = decode_batch(payload)
    except MalformedBatch:
        assert raw == b"\xc1"  # nobody can say where it ends
    else:
        assert len(found.events) == 2
        assert [r.rejection for r in found.rejected] == [Rejection.MALFORMED]


@cache
def real_payloads() -> tuple[bytes, ...]:
    found: list[bytes] = []
    for capture in sorted(CAPTURES.iterdir()):
        if capture.is_dir():
            with gzip.open(capture / "events.jsonl.gz", "rt") as lines:
                found += [base64.b64decode(json.loads(line)["frames"][2]) for _, line in zip(range(3), lines)]  # noqa: B905
    return tuple(found)


def look_at_all_of_it(payload: bytes) -> None:
    found = decode_batch(payload)
    for event in found.events:
        if isinstance(event, BlockStored):
            for look in (event.token_ids, event.extra_keys):
                with contextlib.suppress(MalformedBatch):
                    look()


def test_the_real_payloads_are_read_without_a_rejection() -> None:
    assert len(real_payloads()) > 20
    for payload in real_payloads():
        assert decode_batch(payload).rejected == ()
        look_at_all_of_it(payload)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    payload = bytearray(draw(st.sampled_from(real_payloads())))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(payload) - 1))
        match draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set":
                payload[at] = draw(st.integers(0, 255))
            case "insert":
                payload[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del payload[at : at + draw(st.integers(1, 9))]
            case _:
                del payload[at:]
        if not payload:
            break
    return bytes(payload)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), mutated()))
def test_no_bytes_raise_anything_else(payload: bytes) -> None:
    with contextlib.suppress(MalformedBatch):
        look_at_all_of_it(payload)


# -- at once, or one by one --------------------------------------------------------------------------------------------

ARRAYS = [ARRAY_010, ARRAY_011, ARRAY_016, ARRAY_022, ["BlockRemoved", [1, -2, bytes(32)]], ["AllBlocksCleared"]]
LONG = {**MAP_032, "token_ids": list(range(70_000, 70_400)), "block_size": 200}
MAPS = [
    MAP_027,
    MAP_032,
    LONG,
    {"type": "BlockRemoved", "block_hashes": [1], "medium": "TAPE"},
    {"type": "AllBlocksCleared"},
]
WELL = st.one_of(st.lists(st.sampled_from(ARRAYS), max_size=20), st.lists(st.sampled_from(MAPS), max_size=20))
NOT_WELL = st.lists(st.sampled_from([*ARRAYS, *MAPS, *BAD.values(), ["BlockMoved", 1]]), max_size=20)
TAILS = st.sampled_from([(), (None,), (3,), (3, "later"), (-1,), ("a",)])


def outcome(payload: bytes) -> EventBatch | str:
    try:
        return decode_batch(payload)
    except MalformedBatch as error:
        return str(error)


def has_unreadable_tokens(found: EventBatch | str) -> bool:
    """They are not looked at with the rest, so that they are no msgpack shows when somebody asks for them."""
    if isinstance(found, str):
        return False
    for event in found.events:
        if isinstance(event, BlockStored):
            try:
                event.token_ids()
            except MalformedBatch:
                return True
    return False


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(mutated(), st.builds(lambda events, tail: pack([1.0, events, *tail]), WELL | NOT_WELL, TAILS)),
    st.sampled_from([b"\x92", b"\x93", b"\x9f"]),
)
def test_reading_all_events_at_once_gives_what_reading_them_one_by_one_does(payload: bytes, head: bytes) -> None:
    usual = head + b"\xcb" + struct.pack(">d", 5.0) + payload[10:]
    unusual = head + b"\xcf" + struct.pack(">Q", 5) + payload[10:]  # a whole number for a time: one by one
    at_once, one_by_one = outcome(usual), outcome(unusual)
    assert at_once == one_by_one or (isinstance(one_by_one, str) and has_unreadable_tokens(at_once))


def test_equal_events_have_the_same_bytes_of_tokens() -> None:
    at_once, one_by_one = decode_batch(pack([1.0, [MAP_032]])), decode_batch(pack([1, [MAP_032]]))
    others = decode_batch(pack([1.0, [{**MAP_032, "token_ids": [0, 1, 2, 4]}]]))
    assert at_once == one_by_one != others
    assert isinstance(at_once.events[0], BlockStored)
    assert bytes(at_once.events[0].raw_token_ids) == pack(TOKENS)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, EVENTS_MAX])
def test_as_many_events_as_the_header_says(count: int) -> None:
    assert len(batch(*([["AllBlocksCleared"]] * count)).events) == count


FRAMES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        mutated(),
        st.integers(0, 2**64 - 1).map(lambda seq: struct.pack(">Q", seq)),
        st.sampled_from([b"kv@10.0.0.5@tiny", b"kv@[::1]:9@m"]),
    ),
    max_size=4,
)
GOOD_FRAMES = st.tuples(
    st.sampled_from([b"kv@10.0.0.5@tiny", b"kv@10.0.0.6:1@tiny", b"\xff"]),
    st.integers(0, 3).map(lambda seq: struct.pack(">Q", seq)),
    st.one_of(mutated(), st.sampled_from(real_payloads())),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.one_of(FRAMES, GOOD_FRAMES), st.booleans()), min_size=1, max_size=6))
def test_no_frames_trouble_the_index(messages: list[tuple[Any, bool]]) -> None:
    index = KvIndex(on_finding=lambda engine, finding: None)
    dialled = EngineId("10.0.0.9:8000")
    for now, (frames, is_dialled) in enumerate(messages):
        engine = dialled if is_dialled else None
        peer = None if is_dialled else "10.0.0.5"
        index.on_frames(frames, float(now), peer=peer, dialled=engine, port_rank=0)
        index.on_replayed(dialled, now, frames[-1] if frames else b"", float(now))
        index.on_tick(float(now))
    index.fleet()
