"""Block values: what a partition's blocks hold, read in batches and taken apart without a Python step per record.

Values are the records of `core.projection.RECORD`: 5 bytes a holder, slot number u32 big-endian, copies u8.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvatlas_indexer.adapters.ahead import ahead
from kvatlas_indexer.adapters.redis_client import RedisClient, Request
from kvatlas_indexer.adapters.redis_packing import BlockKeys, Keys, bulk, command, head

RECORDS = np.dtype([("number", ">u4"), ("copies", "u1")])
_END = b"0"
SCAN_COUNT = 2000
"""Keys looked at in one SCAN: about a millisecond of the server's time."""


@dataclass(frozen=True, slots=True)
class Holders:
    """All records of some blocks: `numbers[j]` and `copies[j]` belong to block `block[j]`, ascending."""

    block: NDArray[np.intp]
    numbers: NDArray[np.uint32]
    copies: NDArray[np.uint8]

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> Holders:
        """A value that is not whole records was not written by us, and holds nothing."""
        held = [value if value and not len(value) % RECORDS.itemsize else b"" for value in values]
        records = np.frombuffer(b"".join(held), dtype=RECORDS)
        counts = np.fromiter(map(len, held), dtype=np.intp, count=len(held)) // RECORDS.itemsize
        numbers = records["number"].astype(np.uint32)
        return cls(np.repeat(np.arange(len(held)), counts), numbers, records["copies"])


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks one SCAN came upon."""

    keys: Keys
    values: list[bytes | None]


def block_keys(client: RedisClient, partition: int) -> BlockKeys:
    return BlockKeys(client.key(partition, "b"))


def scan_command(client: RedisClient, partition: int, cursor: bytes, count: int = SCAN_COUNT) -> bytes:
    return command("SCAN", cursor, "MATCH", client.key(partition, "b*"), "COUNT", count)


def mget_command(blocks: BlockKeys, keys: Keys, *others: bytes) -> bytes:
    """Reads `others`, then blocks."""
    return b"".join([head(1 + len(others) + len(keys)), b"$4\r\nMGET\r\n", *map(bulk, others), blocks.bulks(keys)])


async def all_blocks(client: RedisClient, partition: int) -> AsyncIterator[Batch]:
    """Every block of a partition, in batches; a block may come twice. Raises `StoreUnavailable`.

    While one batch is worked on the next is read, and the one after it looked for: neither side waits for the other.
    """
    async with ahead(_names(client, partition)) as names, ahead(_batches(client, partition, names)) as batches:
        async for batch in batches:
            yield batch


async def _names(client: RedisClient, partition: int) -> AsyncGenerator[list[bytes], None]:
    cursor = b""
    while cursor != _END:
        scan = scan_command(client, partition, cursor or _END)
        (((cursor, names),),) = await client.round([Request(partition, [scan])])
        yield names


async def _batches(
    client: RedisClient, partition: int, names: AsyncIterator[list[bytes]]
) -> AsyncGenerator[Batch, None]:
    blocks = block_keys(client, partition)
    async for some in names:
        keys = blocks.keys(some)
        if len(keys):
            ((values,),) = await client.round([Request(partition, [mget_command(blocks, keys)])])
            yield Batch(keys, values)
