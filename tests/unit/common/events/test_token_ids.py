"""Token ids that are taken out of a message: what is read is the same as if they had been walked over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.token_ids import STAND_IN, WORTH_BYTES, taken_out
from kvatlas_common.events.types import BlockStored, EventBatch, MalformedBatch

pack = msgspec.msgpack.encode
NAME, NEXT = b"\xa9token_ids", b"\xaablock_size"
MANY = list(range(70_000, 70_000 + WORTH_BYTES))


def stored(tokens: Any = MANY, **more: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": [11, 12], "parent_block_hash": None, "token_ids": tokens}
    return event | {"block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None} | more


def message(*events: Any) -> bytes:
    return pack([1.0, list(events), 0])


def spelt(name: bytes) -> list[int]:
    """Token ids whose encoding holds the name: its first byte is the end of an id, the others are ids themselves."""
    return [name[0], *name[1:]]


def one_by_one(payload: bytes) -> EventBatch:
    """The same message, with a time that is a whole number, in which nothing is taken out."""
    return decode_batch(payload[:1] + b"\xcf" + (1).to_bytes(8, "big") + payload[10:])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_was_taken_out_fits_where_the_stand_ins_are(count: int) -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU"}
    payload = message(*[event for n in range(count) for event in (stored(MANY[n:]), removed)])
    *_, (spared, taken) = taken_out(payload)
    assert taken == [pack(MANY[n:]) for n in range(count)]
    assert len(spared) < 200 * count
    for tokens in taken:
        spared = spared.replace(STAND_IN, tokens, 1)
    assert spared == payload
    assert decode_batch(payload) == one_by_one(payload)


def test_one_array_is_found_between_the_first_name_and_the_last_whatever_it_spells() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU"}
    tokens = [*MANY, *spelt(NAME), *spelt(NEXT), *MANY]
    payload = message(*[removed] * 20, stored(tokens), removed)
    _, taken = next(taken_out(payload))
    assert taken == [pack(tokens)]
    assert decode_batch(payload) == one_by_one(payload)


@pytest.mark.parametrize("few", [0, 1, 3, 100])
def test_a_long_array_and_a_short_one_are_not_taken_for_one(few: int) -> None:
    for tokens in ((MANY, MANY[:few]), (MANY[:few], MANY), (MANY[:few], MANY, MANY[:few])):
        payload = message(*map(stored, tokens))
        found = decode_batch(payload)
        assert found == one_by_one(payload)
        assert [event.token_ids() for event in found.events if isinstance(event, BlockStored)] == [*tokens]


ODD = {
    "a prompt spells what follows": stored([*MANY, *spelt(NEXT), *MANY]),
    "a prompt spells what follows, at its end": stored([*MANY, *spelt(NEXT), 16]),
    "a prompt spells the name": stored([*MANY, *spelt(NAME), *MANY]),
    "a prompt spells both": stored([*MANY, *spelt(NAME), 1, *spelt(NEXT), *MANY]),
    "an adapter is called like the name": stored(lora_name="token_ids"),
    "an adapter is called like what follows": stored(lora_name="block_size"),
    "an adapter is called like the stand-in": stored(lora_name="no token ids yet"),
    "extra keys hold the stand-in": stored(extra_keys=[[b"no token ids yet"], None]),
    "the stand-in stands for itself": stored(b"no token ids yet", session_id="s" * WORTH_BYTES),
    "text for token ids": stored("t" * WORTH_BYTES),
    "nothing for token ids": stored(None, session_id="s" * WORTH_BYTES),
    "no token ids": stored([], session_id="s" * WORTH_BYTES),
    "text among token ids": stored([*MANY, "x" * 40]),
    "another order": dict(reversed(stored().items())),
    "twice": {**stored(), "ownership": {"token_ids": MANY, "block_size": 1}},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_is_odd_is_read_as_it_is_meant(odd: dict[str, Any]) -> None:
    for payload in (message(odd), message(stored(), odd), message(odd, odd, stored())):
        found = decode_batch(payload)
        assert found == one_by_one(payload)
        assert not found.rejected
        for event in found.events:
            assert isinstance(event, BlockStored)
            assert bytes(event.raw_token_ids) in {pack(odd["token_ids"]), pack(MANY)}


@pytest.mark.parametrize("field", ["token_ids", "block_size", "block_hashes"])
def test_an_event_that_lacks_a_field_costs_itself(field: str) -> None:
    lacking = {name: value for name, value in stored().items() if name != field}
    payload = message(stored(), lacking, stored())
    found = decode_batch(payload)
    assert found == one_by_one(payload)
    assert (len(found.events), len(found.rejected)) == (2, 1)


TOKENS = st.lists(
    st.one_of(st.integers(0, 200_000), st.sampled_from([*NAME, *NEXT])) | st.sampled_from([NAME, NEXT, STAND_IN]),
    max_size=40,
)


@given(st.lists(TOKENS, min_size=1, max_size=4))
def test_whatever_the_token_ids_are(prompts: list[list[Any]]) -> None:
    payload = message(*(stored([*MANY, *tokens]) for tokens in prompts))
    assert decode_batch(payload) == one_by_one(payload)


def test_garbage_among_token_ids_is_seen_by_who_asks_for_them() -> None:
    payload = message(stored())
    at = payload.index(NEXT) - 5
    (event,) = decode_batch(payload[:at] + b"\xc1" + payload[at + 1 :]).events
    assert isinstance(event, BlockStored)
    assert event.keys == [11, 12]
    with pytest.raises(MalformedBatch, match="token_ids"):
        event.token_ids()
