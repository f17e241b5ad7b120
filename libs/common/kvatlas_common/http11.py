"""uvicorn's HTTP/1.1, for ports that anybody may send garbage to.

What cannot be parsed uvicorn (0.54, `protocols/http/`) answers with 400 by itself. But the request whose body broke off
has its application running already: that answers too, which fails with a traceback in the log, or has begun to answer,
and then uvicorn's own 400 fails. Here the application finds its client gone, as it is.

The parser in C takes request lines, headers, trailers and chunk extensions of any length: here they end a connection,
as h11 does it by itself.

To be given to `uvicorn.Config(http=...)`: `FastHttp11` where requests are many (parsed in C), `Http11` elsewhere.

An answer of many small pieces is passed on piece by piece, and ASGI's `send` takes a message and a coroutine for each.
So `FastHttp11` brings applications an extension, `BODY_PIECES`: a `Write`, for what `send` would do just so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

BODY_PIECES = "kvatlas.body_pieces"
Write = Callable[[bytes], bool]
"""Writes a piece of a body, with more to come. False: it did nothing, this is for `send`."""

HEAD_BYTES_MAX = 65_536
"""Of anything that is no body. What is read at once (256 KiB with uvloop) may come on top."""


class Http11(H11Protocol):
    def send_400_response(self, msg: str) -> None:
        if not _client_is_gone(self):
            super().send_400_response(msg)


class FastHttp11(HttpToolsProtocol):
    _head_bytes = 0  # received since the last head, piece of a body, or message was complete

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.logger.warning("Too long a request head received.")
            self.send_400_response("Too long a request head.")

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            cast(dict[str, Any], self.scope)["extensions"] = {BODY_PIECES: _write_of(cycle)}

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not _client_is_gone(self):
            super().send_400_response(msg)


def _write_of(cycle: RequestResponseCycle) -> Write:
    """`cycle.send` of a piece of a body in chunks, where it has not to wait and there is nothing to be refused."""
    flow, transport, headless = cycle.flow, cycle.transport, cycle.scope["method"] == "HEAD"

    def write(piece: bytes) -> bool:
        if flow.write_paused or cycle.disconnected or cycle.response_complete or headless or not piece:
            return False
        if not cycle.response_started or not cycle.chunked_encoding:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    return write


def _client_is_gone(protocol: H11Protocol | HttpToolsProtocol) -> bool:
    """Tells the application of a request under way; True if it has begun to answer: nothing else can be said then."""
    cycle = protocol.cycle
    if cycle is None or cycle.response_complete:
        return False
    cycle.disconnected = True
    cycle.message_event.set()
    if cycle.response_started:
        protocol.transport.close()
    return bool(cycle.response_started)
