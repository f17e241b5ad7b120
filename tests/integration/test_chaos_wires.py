"""The wires of the chaos deployment, with real sockets; and processes with several lives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from kvatlas_loadtest.chaos.wires import FrameRelay, TcpRelay
from kvatlas_loadtest.process import Node, ProcessFailed

SOON_S = 30.0


class Echo:
    """A server that repeats what it is told, its own name before it."""

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        while data := await reader.readline():
            writer.write(self._name + data)
        writer.close()


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_a_service_sends_to_the_first_that_is_there_and_breaks_when_that_goes() -> None:
    first, second = Echo(b"first "), Echo(b"second ")
    targets = [await first.start(), await second.start()]
    relay = TcpRelay(lambda: targets)
    await relay.start()
    async with asyncio.timeout(SOON_S):
        reader, writer = await connect(relay.address)
        writer.write(b"a\n")
        assert await reader.readline() == b"first a\n"
        await first.stop()
        assert await reader.read() == b"", "a connection to one that goes is broken, not moved"
        writer.close()
        reader, writer = await connect(relay.address)
        writer.write(b"b\n")
        assert await reader.readline() == b"second b\n"
        writer.close()
    await relay.close()
    await second.stop()


async def test_a_cut_wire_is_silent_and_delivers_late_when_it_is_mended() -> None:
    echo = Echo(b"")
    relay = TcpRelay(lambda: [address])
    address = await echo.start()
    await relay.start()
    reader, writer = await connect(relay.address)
    relay.cut()
    writer.write(b"a\n")
    late_reader, late_writer = await connect(relay.address)  # the other side's system takes it, nobody serves it
    late_writer.write(b"b\n")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.gather(reader.readline(), late_reader.readline())
    relay.mend()
    async with asyncio.timeout(SOON_S):
        assert tuple(await asyncio.gather(reader.readline(), late_reader.readline())) == (b"a\n", b"b\n")
    for each in (writer, late_writer):
        each.close()
    await relay.close()
    await echo.stop()


@pytest.mark.parametrize("binds", [True, False])
async def test_frames_pass_whole_and_in_order(binds: bool) -> None:
    """Both ways round: engines that bind and are dialled, engines that connect to a listener."""
    context: zmq.asyncio.Context = zmq.asyncio.Context()
    pub, sub = context.socket(zmq.PUB), context.socket(zmq.SUB)
    sub.subscribe(b"")
    ours = pub if binds else sub
    ours.bind("tcp://127.0.0.1:0")
    here = ours.getsockopt_string(zmq.LAST_ENDPOINT)
    relay = FrameRelay(source=here if binds else None, sink=None if binds else here, seed=1)
    try:
        await relay.start()
        (sub if binds else pub).connect(relay.outlet if binds else relay.inlet)
        async with asyncio.timeout(SOON_S):
            while not await sub.poll(20):  # until subscriptions have been exchanged all the way
                await pub.send_multipart([b"join", b""])
            sent = [[b"topic", bytes([number]), b"payload"] for number in range(50)]
            for message in sent:
                await pub.send_multipart(message)
            arrived = [await sub.recv_multipart() for _ in range(51)]
            while arrived[-1] != sent[-1]:  # as many as it took to join come first
                arrived.append(await sub.recv_multipart())
        assert [message for message in arrived if message[0] != b"join"] == sent
    finally:
        await relay.close()
        context.destroy(linger=0)


async def test_a_process_has_several_lives_and_ends_as_it_is_told(tmp_path: Path) -> None:
    addresses: list[str] = []

    def heard(line: dict[str, str]) -> bool:
        addresses.append(line["address"])
        return True

    node = Node("engine", tmp_path, lambda: ["kvatlas_loadtest", "engine"], heard)
    await node.start()
    with pytest.raises(ProcessFailed, match="running already"):
        await node.start()
    node.pause()
    node.kill()
    assert not node.running
    await node.start()
    assert (node.lives, len(set(addresses))) == (2, 2), "the second life has said its own line, not the first one's"
    assert await node.stop() == 0
    assert node.unsound() == []
    with pytest.raises(ProcessFailed, match="is not running"):
        node.pause()


async def test_a_process_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    node = Node("engine", tmp_path, lambda: ["kvatlas_loadtest", "engine", "--nonsense"], lambda line: True)
    with pytest.raises(ProcessFailed, match="--nonsense"):
        await node.start()
