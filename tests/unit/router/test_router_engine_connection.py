"""An answer is the same however its bytes come: at once, one by one, cut anywhere; and what is none is told apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_router.adapters.engine_connection import HEAD_BYTES_MAX, HELD_BYTES_MAX, EngineConnection, EngineFailed
from kvatlas_router.core.outliers import Fault

OK = b"HTTP/1.1 200 OK\r\n"


class Wire(asyncio.Transport):
    """The engine's end, in the hands of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def asked(*, head_only: bool = False) -> tuple[EngineConnection, Wire]:
    wire, connection = Wire(), EngineConnection(lambda _: None)
    connection.connection_made(wire)
    connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", head_only=head_only)
    return connection, wire


async def outcome(connection: EngineConnection) -> tuple[int, bytes, Fault | None]:
    """Status, body, and what went wrong. Nothing is waited for: whatever comes has come."""
    body: list[bytes] = []
    status = 0
    try:
        async with asyncio.timeout(30):
            status = (await connection.head()).status
            connection.pour(body.append)
            assert await connection.poured()
    except EngineFailed as failure:
        return status, b"".join(body), failure.fault
    return status, b"".join(body), None


def chunks(pieces: Sequence[bytes], extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(places) if a < b]


PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=8)
CUTS = st.one_of(st.lists(st.integers(0, 4000), max_size=20), st.just(range(4000)))


@given(PIECES, CUTS, st.sampled_from(["length", "chunks", "extended", "trailers", "close"]), st.integers(0, 2))
async def test_an_answer_is_the_same_however_its_bytes_come(
    pieces: list[bytes], cuts: Sequence[int], framing: str, informational: int
) -> None:
    body = b"".join(pieces)
    head = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * informational + OK + b"X-Empty:\r\nX-Odd: \xff\xe9,  b \r\n"
    )
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    answers = {
        "length": head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunks": chunked + chunks(pieces) + b"0\r\n\r\n",
        "extended": chunked + chunks(pieces, b' ;a="b c"') + b"0\r\n\r\n",
        "trailers": chunked + chunks(pieces) + b"0\r\nX-Late: yes\r\n\r\n",
        "close": head + b"\r\n" + body,
    }
    connection, wire = asked()
    for piece in split(answers[framing], cuts):
        connection.data_received(piece)
    if framing == "close":
        assert not connection.reusable
        connection.eof_received()
    assert await outcome(connection) == (200, body, None)
    said = await connection.head()
    assert said.get(b"x-odd") == b"\xff\xe9,  b"
    assert [name for name, _ in said.headers][:2] == [b"x-empty", b"x-odd"]
    assert said.get(b"x-late") == said.get(b"link") == b""
    assert connection.reusable is (framing != "close")
    assert not wire.closed


@given(st.data(), PIECES, st.booleans())
async def test_what_ends_too_early_is_never_passed_off_as_whole(
    data: st.DataObject, pieces: list[bytes], chunked: bool
) -> None:
    body = b"".join(pieces)
    framed = b"Transfer-Encoding: chunked\r\n\r\n" + chunks(pieces) + b"0\r\n\r\n"
    whole = OK + (framed if chunked else b"Content-Length: %d\r\n\r\n" % len(body) + body)
    sent = whole[: data.draw(st.integers(0, len(whole) - 1))]
    connection, wire = asked()
    if sent:
        connection.data_received(sent)
    if data.draw(st.booleans()):
        connection.eof_received()
    connection.connection_lost(None)
    _, came, fault = await outcome(connection)
    assert fault is Fault.RESET
    assert body.startswith(came)
    assert wire.closed
    assert not connection.reusable


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"X: a\x00b\r\n\r\n",
        OK + b"X y: a\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n",
        OK + b"X: " + b"a" * HEAD_BYTES_MAX,
        OK + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"a" * HEAD_BYTES_MAX,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3000,
    ],
)
async def test_what_is_no_http_is_told_apart(garbage: bytes) -> None:
    for pieces in ([garbage], split(garbage, range(0, len(garbage), max(1, len(garbage) // 500)))):
        connection, wire = asked()
        for piece in pieces:
            if not wire.closed:
                connection.data_received(piece)
        assert (await outcome(connection))[1:] == (b"", Fault.GARBAGE)
        assert wire.closed


@given(st.binary(min_size=1, max_size=400), CUTS)
async def test_noise_never_becomes_an_answer_nor_an_exception(noise: bytes, cuts: Sequence[int]) -> None:
    connection, _ = asked()
    for piece in split(noise, cuts):
        connection.data_received(piece)
    connection.eof_received()
    connection.connection_lost(None)
    status, body, fault = await outcome(connection)
    assert (status, body) == (0, b"")
    assert fault in (Fault.GARBAGE, Fault.RESET)


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"H", b"\x00garbage"])
async def test_what_nobody_asked_for_spoils_the_connection_not_the_answer(more: bytes) -> None:
    for together in (True, False):
        connection, _ = asked()
        whole = OK + b"Content-Length: 5\r\n\r\nhello"
        for piece in [whole + more] if together else [whole, more]:
            connection.data_received(piece)
        assert await outcome(connection) == (200, b"hello", None)
        assert not connection.reusable
    connection, wire = asked()
    connection.data_received(whole)
    assert connection.reusable
    connection.rest()
    connection.data_received(more)
    assert wire.closed
    assert not connection.reusable


@pytest.mark.parametrize(
    ("head", "reusable"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", True),
        (OK + b"Content-Length: 0\r\n\r\n", True),
        (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
    ],
)
async def test_answers_without_a_body(head: bytes, reusable: bool) -> None:
    connection, _ = asked()
    connection.data_received(head)
    assert await connection.begun() == b""
    assert (await outcome(connection))[1:] == (b"", None)
    assert connection.reusable is reusable


async def test_an_answer_to_head_has_no_body_whatever_it_says() -> None:
    connection, _ = asked(head_only=True)
    connection.data_received(OK + b"Content-Length: 99\r\n\r\n")
    assert await outcome(connection) == (200, b"", None)
    assert not connection.reusable


async def test_a_sink_that_holds_gets_the_rest_later_in_order() -> None:
    connection, wire = asked()
    taken: list[bytes] = []

    def sink(data: bytes) -> None:
        taken.append(data)
        connection.hold()

    connection.data_received(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks([b"a"]))
    await connection.head()
    connection.pour(sink)
    assert not wire.reading
    connection.data_received(chunks([b"b", b"c"]) + b"0\r\n\r\n")
    connection.connection_lost(None)
    assert not await connection.poured(), "held, though all has come"
    assert taken == [b"a"]
    connection.resume()
    assert not await connection.poured()
    assert taken == [b"a", b"bc"]
    connection.resume()
    assert await connection.poured()


async def test_what_was_held_is_poured_before_the_failure_is_told() -> None:
    connection, _ = asked()
    taken: list[bytes] = []
    connection.data_received(OK + b"Content-Length: 9\r\n\r\nabc")
    connection.pour(taken.append)
    connection.hold()
    connection.data_received(b"def")
    connection.eof_received()
    assert not await connection.poured()
    connection.resume()
    with pytest.raises(EngineFailed):
        await connection.poured()
    assert taken == [b"abc", b"def"]


async def test_a_connection_that_is_gone_cannot_be_asked() -> None:
    connection, wire = asked()
    connection.connection_lost(None)
    sent = wire.sent
    connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"")
    assert await outcome(connection) == (0, b"", Fault.RESET)
    assert wire.sent == sent


async def test_what_broke_off_before_anybody_looked_is_a_failure() -> None:
    connection, _ = asked()
    connection.data_received(OK + b"Content-Length: 9\r\n\r\nabc")
    connection.connection_lost(ConnectionResetError())
    assert (await connection.head()).status == 200
    with pytest.raises(EngineFailed):
        await connection.begun()


async def test_before_there_is_a_sink_only_so_much_is_read() -> None:
    connection, wire = asked()
    connection.data_received(OK + b"Content-Length: 9999999\r\n\r\n" + bytes(HELD_BYTES_MAX))
    assert wire.reading
    connection.data_received(b"x")
    assert not wire.reading
    assert len(await connection.begun()) == HELD_BYTES_MAX + 1
    connection.pour(lambda _: None)
    assert wire.reading


async def test_a_sink_that_fails_fails_who_waits() -> None:
    def sink(data: bytes) -> None:
        raise RuntimeError("too long")

    connection, _ = asked()
    connection.data_received(OK + b"Content-Length: 9\r\n\r\nabc")
    connection.pour(sink)
    connection.data_received(b"def")
    with pytest.raises(RuntimeError, match="too long"):
        await connection.poured()


async def test_one_connection_answers_one_request_after_the_other() -> None:
    connection, wire = asked()
    for number in range(3):
        connection.data_received(OK + b"Content-Length: 1\r\n\r\n%d" % number)
        assert await outcome(connection) == (200, b"%d" % number, None)
        connection.rest()
        assert connection.reusable
        connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"body")
    assert wire.sent.endswith(b"POST / HTTP/1.1\r\n\r\nbody")
