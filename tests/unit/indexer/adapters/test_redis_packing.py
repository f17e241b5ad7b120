"""Commands on the wire, against redis-py's own packing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from kvatlas_indexer.adapters.redis_blocks import Holders, mget_command
from kvatlas_indexer.adapters.redis_packing import BlockKeys, command, key_array
from kvatlas_indexer.adapters.redis_sweep import sorted_out
from kvatlas_indexer.core.projection import RECORD

keys_ = st.lists(st.integers(0, 2**64 - 1), max_size=40)
records = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 255)), max_size=5, unique_by=lambda r: r[0])


def packed(*arguments: bytes | str | int | float) -> bytes:
    return b"".join(Connection().pack_command(*arguments))  # type: ignore[no-untyped-call]


@given(arguments=st.lists(st.one_of(st.binary(), st.text(), st.integers(), st.floats(allow_nan=False)), max_size=6))
def test_a_command_is_packed_as_redis_py_does(arguments: list[bytes | str | int | float]) -> None:
    assert command("SET", *arguments) == packed("SET", *arguments)


@given(keys=keys_)
def test_block_keys_are_packed_and_read_back(keys: list[int]) -> None:
    blocks = BlockKeys(b"kva1:4:{2}b")
    names = [b"kva1:4:{2}b" + key.to_bytes(8, "big") for key in keys]
    assert mget_command(blocks, key_array(keys), b"kva1:4:{2}v") == packed("MGET", b"kva1:4:{2}v", *names)
    assert blocks.keys([*names, b"kva1:4:{2}b", b"kva1:4:{2}b123456789"]).tolist() == keys


@given(values=st.lists(records, max_size=20))
def test_values_are_taken_apart(values: list[list[tuple[int, int]]]) -> None:
    held = Holders.of([b"".join(RECORD.pack(*r) for r in value) or None for value in values])
    expected = [(i, number, copies) for i, value in enumerate(values) for number, copies in value]
    assert list(zip(held.block.tolist(), held.numbers.tolist(), held.copies.tolist(), strict=True)) == expected


@given(values=st.lists(records, max_size=20), dead=st.sets(st.integers(0, 9)), alive=st.sets(st.integers(0, 9)))
def test_the_sweep_strips_the_dead_and_renews_for_the_living(
    values: list[list[tuple[int, int]]], dead: set[int], alive: set[int]
) -> None:
    data = [b"".join(RECORD.pack(*r) for r in value) or None for value in values]
    renew, strip = sorted_out(data, np.array(sorted(dead), np.uint32), np.array(sorted(alive), np.uint32))
    changed = [i for i, value in enumerate(values) if any(number in dead for number, _ in value)]
    assert strip == [(i, data[i], b"".join(RECORD.pack(*r) for r in values[i] if r[0] not in dead)) for i in changed]
    living = [i for i, value in enumerate(values) if any(number in alive for number, _ in value)]
    assert renew == [i for i in living if i not in changed]
