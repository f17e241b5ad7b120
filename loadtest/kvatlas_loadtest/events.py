"""KV events as bytes, in the forms vLLM has used: `[ts, events, rank]` in msgpack, each event an array or a map.

The forms follow `vllm/distributed/kv_events.py`, whose fields only ever grew at the end: a field without a default is
always there, one with a default (all None) is left out at the end of an array and anywhere in a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from kvatlas_loadtest.kv_events import Cleared, KvEvent, Removed, Stored

_encode = msgspec.msgpack.Encoder().encode

FULL_ATTENTION = "full_attention"


class WireVersion(StrEnum):
    """The vLLM versions whose encoding of events differs."""

    V0_10 = "0.10"
    V0_12 = "0.12"
    V0_16 = "0.16"
    V0_22 = "0.22"
    V0_27 = "0.27"
    V0_32 = "0.32"


@dataclass(frozen=True, slots=True)
class _Form:
    """`required` fields are always written, `optional` ones when they are not None."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_STORED_BASE = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
_STORED_GROUPS = ("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
_STORED = {
    WireVersion.V0_10: _Form(_STORED_BASE),
    WireVersion.V0_12: _Form((*_STORED_BASE, "medium")),
    WireVersion.V0_16: _Form((*_STORED_BASE, "medium", "lora_name")),
    WireVersion.V0_22: _Form((*_STORED_BASE, "medium", "lora_name"), _STORED_GROUPS),
    WireVersion.V0_27: _Form((*_STORED_BASE, "medium", "lora_name"), (*_STORED_GROUPS, "locality")),
    WireVersion.V0_32: _Form(
        (*_STORED_BASE, "medium", "lora_name"), (*_STORED_GROUPS, "locality", "ownership", "session_id")
    ),
}
_REMOVED = {
    WireVersion.V0_10: _Form(("block_hashes",)),
    WireVersion.V0_12: _Form(("block_hashes", "medium")),
    WireVersion.V0_16: _Form(("block_hashes", "medium")),
    WireVersion.V0_22: _Form(("block_hashes", "medium"), ("group_idx",)),
    WireVersion.V0_27: _Form(("block_hashes", "medium"), ("group_idx", "locality")),
    WireVersion.V0_32: _Form(("block_hashes", "medium"), ("group_idx", "locality", "ownership")),
}
_MAPS = (WireVersion.V0_27, WireVersion.V0_32)


@dataclass(frozen=True, slots=True)
class EventEncoder:
    """Encodes the events of one engine. `medium` and `group` are what it announces of every block."""

    version: WireVersion
    block_size: int
    medium: str | None = "GPU"
    group: int = 0
    lora_ids: tuple[tuple[str, int], ...] = ()  # adapter name -> the number older versions publish

    def batch(self, events: Sequence[KvEvent], ts: float, rank: int | None = 0) -> bytes:
        """One message's payload; `ts` in seconds since the epoch."""
        encoded = [self._event(event) for event in events]
        return _encode([ts, encoded] if rank is None else [ts, encoded, rank])

    def _event(self, event: KvEvent) -> object:
        if isinstance(event, Stored):
            return self._form("BlockStored", _STORED[self.version], self._stored_fields(event))
        if isinstance(event, Removed):
            fields = {"block_hashes": [event.hash], "medium": self.medium, "group_idx": self.group}
            return self._form("BlockRemoved", _REMOVED[self.version], fields)
        assert isinstance(event, Cleared)
        return self._form("AllBlocksCleared", _Form(()), {})

    def _stored_fields(self, event: Stored) -> dict[str, Any]:
        return {
            "block_hashes": event.hashes,
            "parent_block_hash": event.parent,
            "token_ids": event.token_ids,
            "block_size": self.block_size,
            "lora_id": dict(self.lora_ids).get(event.lora_name or ""),
            "medium": self.medium,
            "lora_name": event.lora_name,
            "extra_keys": event.extra_keys,
            "group_idx": self.group,
            "kv_cache_spec_kind": FULL_ATTENTION,
        }

    def _form(self, tag: str, form: _Form, fields: dict[str, Any]) -> object:
        optional = {name: fields.get(name) for name in form.optional}
        if self.version in _MAPS:
            required = {name: fields[name] for name in form.required}
            return {"type": tag, **required, **{k: v for k, v in optional.items() if v is not None}}
        values = list(optional.values())
        while values and values[-1] is None:
            values.pop()
        return [tag, *(fields[name] for name in form.required), *values]
