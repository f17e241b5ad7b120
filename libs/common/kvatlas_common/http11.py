"""uvicorn's HTTP/1.1, for ports that anybody may send garbage to.

What cannot be parsed uvicorn (0.54, `protocols/http/h11_impl.py`) answers with 400 by itself. But the request whose
body broke off has its application running already: that answers too, which fails with a traceback in the log, or has
begun to answer, and then uvicorn's own 400 fails. Here the application finds its client gone, as it is.
"""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol


class Http11(H11Protocol):
    """To be given to `uvicorn.Config(http=...)`."""

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        super().send_400_response(msg)
