"""What the router must know of a request's body, whatever its API.

The body is forwarded as it came. Fields have any type here: whether they are right is the engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

SESSION_BODY_BYTES = 1024

Fields = Mapping[str, Any]


class InvalidBody(ValueError):
    """The body is no JSON object; the message says where."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body and the JSON object in it."""

    raw: bytes
    fields: Fields

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Raises `InvalidBody`. What Python's decoder accepts (NaN, lone surrogates) is accepted: engines use it."""
        try:
            fields = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fields = _decoded_leniently(raw, str(error))
        if not isinstance(fields, dict):
            raise InvalidBody("the body is not a JSON object")
        return cls(raw, fields)

    @property
    def model(self) -> str | None:
        model = self.fields.get("model")
        return model if isinstance(model, str) and model else None

    @property
    def streams(self) -> bool:
        return self.fields.get("stream") is True

    @property
    def asks_usage(self) -> bool:
        """Whether the client itself wants the usage chunk of a stream."""
        options = self.fields.get("stream_options")
        return isinstance(options, Mapping) and bool(options.get("include_usage"))

    @property
    def asks_reannouncing(self) -> bool:
        """`kv_cache_report_mode` makes a vLLM engine publish blocks it merely hit, which ruins copy counts.

        vLLM 0.32 v1/request.py reads it from the sampling parameters' extra arguments.
        """
        extra = self.fields.get("vllm_xargs")
        return isinstance(extra, Mapping) and "kv_cache_report_mode" in extra

    def session(self, header: str | None) -> bytes:
        """What ties requests of one conversation together: a header, a field, or else how the body begins."""
        if header:
            return b"header:" + header.encode()
        for name in ("previous_response_id", "prompt_cache_key", "user"):
            value = self.fields.get(name)
            if isinstance(value, str) and value:
                return f"{name}:{value}".encode(errors="replace")
        return b"body:" + self.opening()

    def opening(self) -> bytes:
        """How the conversation begins, which its later turns repeat; other fields may change from turn to turn."""
        messages = self.fields.get("messages")
        opening = messages[:1] if isinstance(messages, list) else self.fields.get("prompt", self.fields.get("input"))
        if not opening:
            return self.raw[:SESSION_BODY_BYTES]
        try:
            return msgspec.json.encode(_begun(opening))[:SESSION_BODY_BYTES]
        except (TypeError, ValueError):  # what only Python's own decoder accepts, such as lone surrogates
            return self.raw[:SESSION_BODY_BYTES]

    def asking_usage(self) -> bytes:
        """The body asking for a usage chunk at the end of the stream; every other value keeps its bytes.

        Raises `InvalidBody` when that cannot be asked without guessing.
        """
        try:
            fields = msgspec.json.decode(self.raw, type=dict[str, msgspec.Raw])
            given = fields.get("stream_options", msgspec.Raw(b"{}"))
            options = msgspec.json.decode(given, type=dict[str, msgspec.Raw] | None) or {}
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidBody(str(error)) from None
        asking = msgspec.json.encode(options | {"include_usage": msgspec.Raw(b"true")})
        return msgspec.json.encode(fields | {"stream_options": msgspec.Raw(asking)})


def _begun(opening: Any) -> Any:
    """Enough of it for the beginning of its JSON: a long text is not encoded for its first kilobyte."""
    if isinstance(opening, list):
        return [_cut(item) for item in opening[:SESSION_BODY_BYTES]]
    return _cut(opening)


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:SESSION_BODY_BYTES]
    if isinstance(value, dict):
        return {name: text[:SESSION_BODY_BYTES] if isinstance(text, str) else text for name, text in value.items()}
    return value


def _decoded_leniently(raw: bytes, why: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidBody(f"the body is not valid JSON: {why}") from None
