"""The ways to a store, and what happens when it is away, moves, or is not fit to hold an index."""

from __future__ import annotations

import asyncio
import binascii
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvatlas_indexer.adapters.redis_client import RedisClient, StoreUnavailable, Timeouts, open_redis
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import Outcome
from kvatlas_loadtest.valkey import Valkey, start_cluster
from tests.integration.redis_kit import PATIENT, SOON, A, fresh_prefix, opened, own, put, table

TLS = Path(__file__).parents[1] / "data" / "tls"
SOCKET_PATH_MAX = 100


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Valkey]:
    """A server that this test alone may stop, fill and configure."""
    with Valkey(tmp_path) as server:
        yield server


# -- ways in -----------------------------------------------------------------------------------------------------------


async def test_a_user_a_password_and_a_database(mine: Valkey) -> None:
    with mine.client() as admin:
        admin.execute_command("ACL", "SETUSER", "atlas", "on", ">s3:cr@t", "~kva1:*", "+@all", "-@dangerous", "+info")
        admin.execute_command("ACL", "SETUSER", "default", "off")
    url = f"redis://atlas:s3%3Acr%40t@{mine.address}/3"
    async with opened(url, "kva1:") as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: {1: 1}})
        assert await client.command(0, "DBSIZE") == 2
    with pytest.raises(StoreUnavailable) as refused:
        await open_redis(f"redis://atlas:wrong-secret@{mine.address}/3")
    assert "secret" not in str(refused.value)
    assert "atlas@127.0.0.1" in str(refused.value)


async def test_a_prefix_keeps_deployments_apart(mine: Valkey) -> None:
    async with opened(mine.url, "red:") as red, opened(mine.url, "blue:") as blue:
        store = RedisStore(red)
        await own(store, A)
        await put(store, A, {7: {1: 1}})
        assert await table(RedisStore(blue), [7]) == {}
        assert all(name.startswith(b"red:1:{0}") for name in await red.command(0, "KEYS", "*"))


@pytest.mark.parametrize("prefix", ["a{b", "a*", "kva ", "ü"])
async def test_a_prefix_that_redis_would_read_otherwise_is_refused(single: Valkey, prefix: str) -> None:
    with pytest.raises(ValueError, match="key prefix"):
        await open_redis(single.url, prefix=prefix)


async def test_a_socket_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "s"
    if len(str(path)) > SOCKET_PATH_MAX:
        pytest.skip("the temporary folder's name is too long for a socket")
    with Valkey(tmp_path, "--unixsocket", str(path)):
        async with opened(f"unix://{path}?db=2") as client:
            assert await client.command(0, "PING") == b"PONG"


async def test_over_tls_whose_authority_is_checked(single: Valkey) -> None:
    async with tls_in_front_of(single) as port:
        async with opened(f"rediss://127.0.0.1:{port}/0?ca={TLS / 'ca.pem'}") as client:
            store = RedisStore(client)
            await own(store, A)
            await put(store, A, {7: dict.fromkeys(range(2000), 1)})
            assert len(await table(store, [7])) == 2000
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await open_redis(f"rediss://127.0.0.1:{port}/0")


@asynccontextmanager
async def tls_in_front_of(server: Valkey) -> AsyncIterator[int]:
    """The package's Valkey is built without TLS: this ends it, as a sidecar would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, outer), pump(inner, writer), return_exceptions=True)
        writer.close()
        outer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        await listening.wait_closed()
        await asyncio.sleep(0)


# -- fit to hold an index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_drops_entries_is_refused_with_the_cure(
    mine: Valkey, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with mine.client() as admin:
        admin.config_set("maxmemory-policy", policy)
        async with opened(mine.url):
            pass  # without a limit nothing is dropped
        admin.config_set("maxmemory", "100mb")
    with pytest.raises(StoreUnavailable, match=f"{policy}.*CONFIG SET maxmemory-policy noeviction"):
        await open_redis(mine.url)
    async with opened(mine.url, evictions_allowed=True):
        assert "drops entries of the index" in caplog.text


async def test_a_full_server_is_said_to_be_full_and_nothing_is_half_written(mine: Valkey) -> None:
    async with opened(mine.url) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: {1: 1}})
        with mine.client() as admin:
            admin.config_set("maxmemory", 1)
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                await put(store, A, {7: {1: 2, 2: 1}})
            assert await table(store, [7]) == {(7, 1): 1}
            admin.config_set("maxmemory", 0)
        await put(store, A, {7: {1: 2, 2: 1}})


# -- away --------------------------------------------------------------------------------------------------------------


async def test_while_the_server_is_away_everybody_is_told_at_once(mine: Valkey) -> None:
    async with opened(mine.url, timeouts=Timeouts(connect_s=10, command_s=20, lookup_s=20)) as client:
        store = RedisStore(client)
        await own(store, A)
        mine.stop()
        began = time.monotonic()
        found = await asyncio.gather(*(store.lookup([1]) for _ in range(100)), return_exceptions=True)
        assert {type(error) for error in found} == {StoreUnavailable}
        assert time.monotonic() - began < 8  # nobody waits until their time is over, on however busy a machine
        mine.start()
        await back(client)
        await put(store, A, {7: {1: 1}}, expect=Outcome.BEHIND)  # it kept nothing
        await put(store, A, {7: {1: 1}}, whole=True)
        assert await table(store, [7]) == {(7, 1): 1}


async def test_a_server_that_hangs_costs_a_lookup_no_more_than_its_time(mine: Valkey) -> None:
    async with opened(mine.url, timeouts=SOON) as client:
        store = RedisStore(client)
        mine.pause()
        try:
            began = time.monotonic()
            found = await asyncio.gather(*(store.lookup([1]) for _ in range(40)), return_exceptions=True)
            assert {type(error) for error in found} == {StoreUnavailable}
            assert f"no answer within {SOON.lookup_s} s" in str(found[0])
            assert time.monotonic() - began < 10 * SOON.lookup_s  # one after the other it would be 40
        finally:
            mine.resume()
        await back(client)


async def test_an_idle_connection_the_server_closed_goes_unnoticed(mine: Valkey) -> None:
    async with opened(mine.url) as client:
        store = RedisStore(client)
        await own(store, A)
        with mine.client() as admin:
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal")
        await put(store, A, {7: {1: 1}})


async def test_nobody_there(tmp_path: Path) -> None:
    unused = Valkey(tmp_path)
    for url in (unused.url, f"redis+cluster://{unused.address}", f"redis+sentinel://{unused.address}/main"):
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            await open_redis(url)


# -- moving ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def movable(tmp_path: Path) -> Iterator[list[Valkey]]:
    """A cluster of its own: nodes that a slot was taken from may take it back, whenever they hear of an older epoch."""
    servers = start_cluster(tmp_path)
    yield servers
    for server in servers:
        server.stop()


async def test_a_slot_of_the_cluster_moves(movable: list[Valkey]) -> None:
    """MOVED is followed; while the slot is on its way nobody answers for what is not there."""
    async with opened(f"redis+cluster://{movable[0].address}", timeouts=SOON) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: {3: 1}})
        slot = binascii.crc_hqx(b"3", 0) % 16384
        before = owner(movable, slot)
        after = movable[(movable.index(before) + 1) % 3]
        with before.client() as source, after.client() as target:
            ids = [str(c.execute_command("CLUSTER", "MYID").decode()) for c in (source, target)]
            for name in source.keys(client.key(3, "*").decode()):
                source.delete(name)
            target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            with pytest.raises(StoreUnavailable, match="ASK"):
                await store.lookup([3])
            for admin in (target, source):
                admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        assert await store.positions([(A, 1)]) == {A: [Outcome.OK] * 3 + [Outcome.BEHIND]}
        await put(store, A, {8: {3: 1}}, whole=True)
        assert await table(store, [8]) == {(8, 3): 1}


def owner(cluster: list[Valkey], slot: int) -> Valkey:
    with cluster[0].client() as admin:
        for first, last, (_, port, *_), *_ in admin.execute_command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(server for server in cluster if server.port == port)
    raise AssertionError


async def test_sentinel_names_another_master(tmp_path: Path) -> None:
    """The master dies; what it had is on its replica, and the store goes on there by itself."""
    with Valkey(tmp_path / "a") as first, Valkey(tmp_path / "b", "--replicaof", "127.0.0.1", str(first.port)) as second:
        config = tmp_path / "s" / "sentinel.conf"
        config.parent.mkdir()
        config.write_text(
            f"sentinel monitor main 127.0.0.1 {first.port} 1\n"
            "sentinel down-after-milliseconds main 300\n"
            "sentinel failover-timeout main 3000\n"
        )
        with Valkey(tmp_path / "s", sentinel=True) as sentinel, second.client() as replica:
            await until(lambda: replica.info("replication").get("master_link_status") == "up")
            await until(lambda: knows_replica(sentinel))
            async with opened(f"redis+sentinel://{sentinel.address}/main/0", fresh_prefix()) as client:
                store = RedisStore(client)
                await own(store, A)
                await put(store, A, {7: {1: 1}})
                await until(lambda: replica.dbsize() == 2)
                first.stop()
                await back(client)
                assert (await client.info(0, "server"))["tcp_port"] == str(second.port)
                await put(store, A, {7: {2: 1}})
                assert await table(store, [7]) == {(7, 1): 1, (7, 2): 1}


def knows_replica(sentinel: Valkey) -> bool:
    with sentinel.client() as asked:
        return b"num-slaves" in (fields := asked.execute_command("SENTINEL", "MASTER", "main")) and (
            fields[fields.index(b"num-slaves") + 1] == b"1"
        )


async def until(true: object, within_s: float = 15.0) -> None:
    assert callable(true)
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.02)


async def back(client: RedisClient) -> None:
    """Until the store answers again, and may be written to."""
    async with asyncio.timeout(PATIENT.command_s):
        while True:
            try:
                await client.command(0, "SET", client.key(0, "probe"), 1, "EX", 10)
                return
            except StoreUnavailable:
                await asyncio.sleep(0.02)
