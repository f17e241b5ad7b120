"""uvicorn's HTTP/1.1, for ports that anybody may send garbage to.

What cannot be parsed uvicorn (0.54, `protocols/http/`) answers with 400 by itself. But the request whose body broke off
has its application running already: that answers too, which fails with a traceback in the log, or has begun to answer,
and then uvicorn's own 400 fails. Here the application finds its client gone, as it is.

To be given to `uvicorn.Config(http=...)`: `FastHttp11` where requests are many (parsed in C), `Http11` elsewhere.
"""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Http11(H11Protocol):
    def send_400_response(self, msg: str) -> None:
        if not _client_is_gone(self):
            super().send_400_response(msg)


class FastHttp11(HttpToolsProtocol):
    def send_400_response(self, msg: str) -> None:
        if not _client_is_gone(self):
            super().send_400_response(msg)


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
