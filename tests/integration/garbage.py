"""Whatever a port may be sent by those who mistake it, scan it, or mean harm. All of it is reproducible from a seed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence

import aiohttp
import grpc
import msgspec
import zmq
import zmq.asyncio

from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb

STRANGER = "127.0.0.2"
"""Where false messages come from: all of 127/8 is loopback, and ZeroMQ tells its peers apart by address."""
CALL_S = 10.0
SERVICE = "/kvatlas.v1.KvIndex"


def greetings(seed: int) -> list[bytes]:
    """First bytes of connections that are something else than what is served."""
    noise = random.Random(seed).randbytes
    zmtp = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\x00")  # a ZMTP 3.0 greeting, 64 bytes
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return [
        noise(1),
        noise(5000),
        bytes(4096),
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise(508),  # a TLS ClientHello
        http2 + noise(300),
        http2 + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff\xff\xff\x01\x04" + noise(200),
        zmtp + noise(200),
        zmtp + b"\x04\xff\xff\xff\xff\xff\xff\xff\xff",  # a command of 2^64 - 1 bytes
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ]


async def knock(address: str, data: bytes, *, reset: bool) -> None:
    """Says something, waits for an answer a moment, and goes; with `reset`, without a good-bye."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection(host, int(port))
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.write(data)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1 << 16), 0.05)
        writer.close()
        await writer.wait_closed()


ENDLESS = {
    "request line": (b"GET /", b"a"),
    "header": (b"GET / HTTP/1.1\r\nx: ", b"a"),
    "headers": (b"GET / HTTP/1.1\r\n", b"x: y\r\n"),
    "chunk extension": (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "trailers": (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
}
"""Requests that begin and go on for ever, with what."""


async def goes_on(address: str, begin: bytes, more: bytes, bytes_max: int) -> bool:
    """Whether all of so much of a request was taken without the connection being closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(begin)
        for _ in range(bytes_max // 65_536):
            writer.write(more * (65_536 // len(more)))
            await asyncio.wait_for(writer.drain(), CALL_S)
            if reader.at_eof():
                return False
        return True
    except ConnectionError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def half_open(addresses: Sequence[str], each: int) -> AsyncIterator[None]:
    """Connections that say nothing, or only half of something, and stay."""
    writers: list[asyncio.StreamWriter] = []
    for number in range(each):
        for address in addresses:
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            if number % 2:
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
            writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@contextlib.asynccontextmanager
async def babbler(seed: int) -> AsyncIterator[str]:
    """A port that answers everybody with noise: the address of an engine that is none."""
    chance = random.Random(seed)

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(chance.randbytes(2000))
            await reader.read(1000)
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


# -- events ------------------------------------------------------------------------------------------------------------


def stored(keys: Sequence[int], tokens: int = 16) -> bytes:
    """A batch that is well-formed, as vLLM 0.32 would send it, of blocks nobody has."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(keys),
        "parent_block_hash": None,
        "token_ids": list(range(tokens * len(keys))),
        "block_size": tokens,
        "medium": "GPU",
    }
    return msgspec.msgpack.encode([1.0, [event], None])


def strange_messages(seed: int, listened: str, dialled: str) -> dict[str, list[list[bytes]]]:
    """Messages by the reason for which each is refused. `listened` and `dialled`: engines that are known."""
    noise, good = random.Random(seed).randbytes, stored([1, 2, 3])
    deep = b"\x93\xcb" + bytes(8) + b"\x91" * 100_000 + b"\xc0"
    number, own = (5).to_bytes(8, "big"), f"kv@{listened}@tiny".encode()
    return {
        "frames": [
            [b""],
            [noise(30)],
            [own, good],
            [own, number, good, b"more"],
            [own, b"12345", good],
            [noise(3)] * 40,
        ],
        "message": [
            [topic, number, good] for topic in (b"", b"kv@", b"kv@@tiny", noise(40), b"kv@\xff:1@tiny", b"kv@a:99999@m")
        ]
        + [[own, number, it] for it in (b"", noise(200), b"\x93", b"\xdd\xff\xff\xff\xff", deep, b"\xc1" * 9)],
        "claim": [
            [own, number, good],
            [f"kv@{listened}@a-model-nobody-serves".encode(), number, good],
            [f"kv@{dialled}@tiny".encode(), number, good],
        ],
    }


@contextlib.asynccontextmanager
async def strange_publisher(endpoint: str) -> AsyncIterator[zmq.asyncio.Socket]:
    """A publisher at `STRANGER` that is connected and has been subscribed to."""
    context: zmq.asyncio.Context = zmq.asyncio.Context()
    publisher = context.socket(zmq.XPUB)
    try:
        publisher.set(zmq.SNDHWM, 100_000)
        publisher.connect(endpoint.replace("tcp://", f"tcp://{STRANGER}:0;"))
        async with asyncio.timeout(CALL_S):
            assert await publisher.recv() == b"\x01"
        yield publisher
    finally:
        publisher.close(linger=0)
        context.term()


# -- calls -------------------------------------------------------------------------------------------------------------


async def strange_calls(target: str, seed: int) -> list[str]:
    """gRPC calls that cannot be answered, and the status each was given."""
    noise = random.Random(seed).randbytes

    def ask(model: str = "tiny", keys: bytes = bytes(8), profile: str = "p", count: int = 1) -> bytes:
        prompts = [pb.PromptKeys(profile=profile, keys=keys)] * count
        return pb.MatchRequest(model=model, prompts=prompts).SerializeToString()

    bad_subset = pb.MatchRequest(model="tiny", engines=["no address"], prompts=[pb.PromptKeys(profile="p")])
    requests = [ask(keys=bytes(7)), ask(model=""), ask(profile=""), ask(count=0), bad_subset.SerializeToString()]
    requests += [ask(model="nobody-serves-this"), ask(count=100), ask(keys=bytes(8 * 70_000))]
    requests += [noise(500), b"\xff" * 100, os.urandom(1 << 20)]
    statuses: list[str] = []
    async with grpc.aio.insecure_channel(target) as channel:
        observe: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"{SERVICE}/Observe")
        for method, payloads in (("Match", requests), ("Absent", [b""])):
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{SERVICE}/{method}")
            for payload in payloads:
                try:
                    await call(payload, timeout=CALL_S)
                    statuses.append("OK")
                except grpc.aio.AioRpcError as error:
                    statuses.append(error.code().name)
        for payload in (noise(100), pb.Observation(request_id="1", engine="no address").SerializeToString()):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await observe(iter([payload] * 50), timeout=CALL_S)
    return statuses


async def strange_requests(session: aiohttp.ClientSession, base: str, paths: Sequence[str], seed: int) -> list[int]:
    """HTTP requests that are HTTP but make no sense, and the status each was given."""
    noise = random.Random(seed).randbytes
    deep = b"[" * 100_000
    bodies = [b"", b"{", b"null", b"[]", b"\xff\xfe", noise(1000), deep, b'{"model": 5}', b'{"model": "nobody"}']
    bodies += [b'{"model": "tiny", "messages": 7, "messages": [' + b"{}," * 50 + b"1]}", b'{"a": ' + b"9" * 5000 + b"}"]
    statuses: list[int] = []
    for path in paths:
        for body in bodies:
            async with session.post(base + path, data=body, headers={"content-type": "application/json"}) as response:
                statuses.append(response.status)
                await response.read()
        for method in ("PUT", "TRACE", "BREW"):
            async with session.request(method, base + path) as response:
                statuses.append(response.status)
    return statuses
