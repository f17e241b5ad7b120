"""Real Valkeys for tests, one alone and three as a cluster, and short ways to write to them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import RedisClient, Timeouts, open_redis
from kvatlas_indexer.adapters.redis_store import Lookup, RedisStore
from kvatlas_indexer.adapters.redis_writes import Outcome, Position
from kvatlas_indexer.core.projection import RECORD, SlotWrite, Write
from kvatlas_loadtest.valkey import Valkey, start_cluster

A, B = EngineId("10.0.0.1:8000"), EngineId("10.0.0.2:8000", 1)
START = Position(epoch=1, seq=0, ts=1.5, digest=2**64 - 1)
SOON = Timeouts(connect_s=1.0, command_s=1.0, lookup_s=1.0)
PATIENT = Timeouts(command_s=20.0, lookup_s=20.0)  # the machine may be busy with other tests

_prefixes = itertools.count()


@pytest.fixture(scope="session")
def single() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory() as folder, Valkey(Path(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[list[Valkey]]:
    with tempfile.TemporaryDirectory() as folder:
        servers = start_cluster(Path(folder))
        yield servers
        for server in servers:
            server.stop()


@pytest.fixture(params=["single", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a single server, then of a cluster."""
    if request.param == "single":
        return str(request.getfixturevalue("single").url)
    return f"redis+cluster://{','.join(server.address for server in request.getfixturevalue('cluster'))}"


def fresh_prefix() -> str:
    """So that no test sees what another has written."""
    return f"test{next(_prefixes)}:"


@asynccontextmanager
async def opened(url: str, prefix: str | None = None, **options: Any) -> AsyncIterator[RedisClient]:
    options = {"timeouts": PATIENT, **options}
    client = await open_redis(url, prefix=fresh_prefix() if prefix is None else prefix, **options)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def stored(url: str, prefix: str | None = None, **options: Any) -> AsyncIterator[RedisStore]:
    async with opened(url, prefix, **options) as client:
        yield RedisStore(client)


def writes(store: RedisStore, engine: EngineId, slots: Mapping[int, Mapping[int, int]]) -> list[Write]:
    """Slot number -> key -> copies, as one write per partition, the empty ones too."""
    parts: list[list[SlotWrite]] = [[] for _ in range(store.partitions)]
    for number, copies in slots.items():
        for partition, part in enumerate(parts):
            keys = [key for key in copies if key % store.partitions == partition]
            if keys:
                part.append(SlotWrite(number, keys, bytes(copies[key] for key in keys)))
    return [Write(engine, partition, tuple(part)) for partition, part in enumerate(parts)]


async def own(store: RedisStore, engine: EngineId, fence: int = 1) -> None:
    """Take an engine nothing is known of: all of it, which is nothing, is published."""
    assert await store.raise_fence(engine, fence) == [None] * store.partitions
    await put(store, engine, {}, fence=fence, whole=True)


async def put(
    store: RedisStore,
    engine: EngineId,
    slots: Mapping[int, Mapping[int, int]],
    *,
    fence: int = 1,
    position: Position = START,
    whole: bool = False,
    expect: Outcome = Outcome.OK,
) -> None:
    outcomes = await store.write(writes(store, engine, slots), fence, position, whole=whole)
    assert outcomes == [expect] * store.partitions


async def table(store: RedisStore, numbers: Iterable[int]) -> dict[tuple[int, int], int]:
    """(slot, key) -> copies: all that is held in these slots."""
    return {(number, key): copies async for batch in store.scan(set(numbers)) for key, number, copies in batch}


def read(lookup: Lookup) -> list[dict[int, int]]:
    """Per block: slot -> copies."""
    return [dict(RECORD.iter_unpack(value or b"")) for value in lookup.values]
