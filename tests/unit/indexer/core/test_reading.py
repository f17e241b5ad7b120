"""What a message says by itself."""

from __future__ import annotations

import msgspec
import pytest
import xxhash

from kvatlas_common.events.types import BlockRemoved
from kvatlas_indexer.core.reading import read

PAYLOAD = msgspec.msgpack.encode([1.5, [{"type": "BlockRemoved", "block_hashes": [9]}], 3])


def test_what_an_engine_sends() -> None:
    reading = read([b"kv@a@m", (7).to_bytes(8, "big"), PAYLOAD], 100.0)
    message = reading.message
    assert message is not None
    assert (reading.came, reading.topic, reading.framed, reading.why) == (100.0, b"kv@a@m", True, "")
    assert (message.seq, message.size, message.digest) == (7, len(PAYLOAD), xxhash.xxh3_64_intdigest(PAYLOAD))
    assert (message.ts, message.batch.rank) == (1.5, 3)
    assert [type(event) for event in message.batch.events] == [BlockRemoved]


@pytest.mark.parametrize(
    ("frames", "topic", "framed", "why"),
    [
        ([], b"", False, "not [topic, seq, payload]"),
        ([b"t", bytes(8)], b"t", False, "not [topic, seq, payload]"),
        ([b"t", bytes(7), PAYLOAD], b"t", False, "sequence frame: 7 bytes"),
        ([b"t", bytes(8), b"\xc1"], b"t", True, "payload"),
    ],
)
def test_what_cannot_be_used_says_why(frames: list[bytes], topic: bytes, framed: bool, why: str) -> None:
    reading = read(frames, 0.0)
    assert (reading.message, reading.topic, reading.framed) == (None, topic, framed)
    assert why in reading.why
