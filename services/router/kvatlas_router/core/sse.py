"""Server-sent events, as far as a proxy must know them: how to end a stream that was cut, and which chunk to drop.

Only `--request-usage` ever parses a stream, and then it holds back no more than the event being received.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

HELD_BACK_BYTES_MAX = 1024 * 1024


class _Chunk(msgspec.Struct):
    choices: Any = None
    usage: Any = None


class UsageChunkFilter:
    """Passes a stream's events on as they came, except the usage chunk that the client did not ask for.

    `dropped` is that chunk. An event longer than `HELD_BACK_BYTES_MAX` is passed on unseen.
    """

    def __init__(self) -> None:
        self.dropped: bytes | None = None
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        data = self._held + chunk
        end = data.rfind(b"\n\n") + 2
        if end < 2 and len(data) > HELD_BACK_BYTES_MAX:
            self._held = b""
            return data
        whole, self._held = (data[:end], data[end:]) if end >= 2 else (b"", data)
        events = whole.split(b"\n\n")[:-1]
        return b"".join(e + b"\n\n" for e in events if not self._is_ours(e))

    def rest(self) -> bytes:
        """What an engine that ended the stream mid-event left behind."""
        held, self._held = self._held, b""
        return held

    def _is_ours(self, event: bytes) -> bool:
        if not event.startswith(b"data:") or b'"usage"' not in event:
            return False
        try:
            chunk = msgspec.json.decode(event[5:].strip(), type=_Chunk)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        ours = chunk.choices == [] and chunk.usage is not None
        if ours:
            self.dropped = event
        return ours


def cut_event(path: str, message: str) -> bytes:
    """An error event in the shape clients of that API expect; the blank line first ends an event cut in the middle."""
    if path == "/v1/messages":
        fields: dict[str, object] = {"type": "error", "error": {"type": "api_error", "message": message}}
        head = "event: error\n"
    elif path == "/v1/responses":
        fields = {"type": "error", "code": "server_error", "message": message, "param": None}
        head = "event: error\n"
    else:
        fields = {"error": {"message": message, "type": "engine_lost", "param": None, "code": 502}}
        head = ""
    return f"\n\n{head}data: {json.dumps(fields)}\n\n".encode()


def ended(tail: bytes) -> bool:
    """Whether a stream had said all it had to say when the connection broke."""
    return tail.rstrip().endswith(b"data: [DONE]")
