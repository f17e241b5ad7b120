"""KV events off the wire: ZeroMQ frames `[topic, seq, payload]` to typed events.

The payload is msgpack of the batch array `[ts, events, data_parallel_rank?]`. An event is an array with its type first
(vLLM 0.10 - 0.22, SGLang) or a map with a `type` (vLLM >= 0.27); trailing defaults are omitted, unknown trailing
fields and unknown keys are ignored. Two rules shape this module:

- one bad event costs that event, not its batch: it ends up in `EventBatch.rejected`, its siblings in `events`;
- token ids are most of the bytes and seldom needed: they stay undecoded (`msgspec.Raw`) until someone asks. Skipping
  them is most of the work: where that can be they are taken out beforehand (`token_ids`), and a batch is read in one
  pass as long as all of it is well. Where it is not, its events are told apart first and read one by one, with the same
  result for those that can be read.

Arbitrary bytes raise nothing but `MalformedBatch`. Source: vLLM 0.10 - 0.32 `distributed/kv_events.py`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TypeAlias

import msgspec

from kvatlas_common.events.token_ids import STAND_IN, taken_out
from kvatlas_common.events.types import (
    FOREIGN_ERRORS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    MalformedBatch,
    RejectedEvent,
    Rejection,
    Topic,
    array_length,
    decode_any,
)
from kvatlas_common.words import KEY_MASK, Medium

RANK_MAX = 4095
EVENTS_MAX = 65_536
"""Events in one batch: a step of an engine evicts at most as many blocks as it computes."""
GROUP_MAX = 255
BLOCK_SIZE_MAX = 1 << 20

_MEDIA = {
    None: Medium.GPU,
    "GPU": Medium.GPU,
    "HBM": Medium.GPU,
    "CPU": Medium.CPU,
    "CPU_PINNED": Medium.CPU,
    "CPU_TIER1": Medium.CPU,
    "DRAM": Medium.CPU,
    "STORAGE": Medium.STORAGE,
    "DISK": Medium.STORAGE,
    "FS": Medium.STORAGE,
    "REMOTE": Medium.REMOTE,
    "EXTERNAL": Medium.REMOTE,
}


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class _StoredArray(_Stored, tag="BlockStored", array_like=True, gc=False):
    pass


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True, gc=False):
    pass


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


_Map: TypeAlias = _Stored | _Removed | _Cleared
_Array: TypeAlias = _StoredArray | _RemovedArray | _ClearedArray


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    rank: int | None = None


class _MapBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Map]
    rank: int | None = None


class _ArrayBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Array]
    rank: int | None = None


class _BatchHead(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: msgspec.Raw


_decode_head = msgspec.msgpack.Decoder(_BatchHead).decode
_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_maps = msgspec.msgpack.Decoder(_MapBatch).decode
_decode_arrays = msgspec.msgpack.Decoder(_ArrayBatch).decode
_decode_map = msgspec.msgpack.Decoder(_Map).decode
_decode_array = msgspec.msgpack.Decoder(_Array).decode


def decode_batch(payload: bytes) -> EventBatch:
    """Raises `MalformedBatch` when nothing of the message can be used."""
    batch = _at_once(payload)
    if batch is not None:
        ts, rank, found = batch.ts, batch.rank, [_usable(event) for event in batch.events]
    else:
        ts, rank, found = _one_by_one(payload)
    if rank is not None and not 0 <= rank <= RANK_MAX:
        raise MalformedBatch(f"data_parallel_rank: {rank} is not in 0..{RANK_MAX}")
    if not 0 <= ts < 1e12:  # also turns away NaN, which would poison every later comparison
        raise MalformedBatch(f"ts: {ts} is not a time in seconds")
    events = tuple([event for event in found if not isinstance(event, RejectedEvent)])
    if len(events) == len(found):
        return EventBatch(ts, rank, events)
    return EventBatch(ts, rank, events, tuple([event for event in found if isinstance(event, RejectedEvent)]))


def _at_once(payload: bytes) -> _MapBatch | _ArrayBatch | None:
    """None where it is not the usual thing: `ts` written as a double, all events of the same form, none that is bad."""
    if len(payload) < _EVENTS_AT + 6 or not 0x92 <= payload[0] <= 0x9F or payload[1] != 0xCB:
        return None
    events = payload[_EVENTS_AT]
    first = _EVENTS_AT + (1 if events <= 0x9F else 3 if events == 0xDC else 5)
    if len(payload) > EVENTS_MAX and array_length(payload[_EVENTS_AT:first]) > EVENTS_MAX:
        return None
    try:
        if payload[first] in _MAP_STARTS:
            return _without_tokens(payload) or _decode_maps(payload)
        return _decode_arrays(payload)
    except FOREIGN_ERRORS:
        return None


def _without_tokens(payload: bytes) -> _MapBatch | None:
    """None where the token ids cannot be told from the rest: see `token_ids`."""
    for spared, taken in taken_out(payload):
        try:
            batch = _decode_maps(spared)
        except FOREIGN_ERRORS:
            continue
        if _put_back(batch, taken):
            return batch
    return None


def _put_back(batch: _MapBatch, taken: list[memoryview]) -> bool:
    """Token ids where their stand-ins are; False where those are not just there."""
    stored = [event for event in batch.events if type(event) is _Stored]
    if len(stored) != len(taken):
        return False
    for event, tokens in zip(stored, taken, strict=True):
        if bytes(event.token_ids) != STAND_IN:
            return False
        event.token_ids = msgspec.Raw(tokens)
    return True


def _one_by_one(payload: bytes) -> tuple[float, int | None, list[Event | RejectedEvent]]:
    try:
        if len(payload) > EVENTS_MAX and array_length(_decode_head(payload).events) > EVENTS_MAX:
            raise MalformedBatch(f"payload: more than {EVENTS_MAX} events")
        batch = _decode_batch(payload)
    except FOREIGN_ERRORS as error:
        raise MalformedBatch(f"payload: {error}") from None
    return batch.ts, batch.rank, [_decode_event(raw) for raw in batch.events]


def _decode_event(raw: msgspec.Raw) -> Event | RejectedEvent:
    try:
        is_map = memoryview(raw)[0] in _MAP_STARTS
        return _usable(_decode_map(raw) if is_map else _decode_array(raw))
    except FOREIGN_ERRORS as error:
        return _reject(raw, str(error))


def _usable(event: _Map | _Array) -> Event | RejectedEvent:
    try:
        if isinstance(event, _Stored):
            return _stored(event)
        if isinstance(event, _Removed):
            return BlockRemoved(_keys(event.block_hashes), _medium(event.medium), _group(event.group_idx))
        return AllBlocksCleared()
    except _Unusable as unusable:
        return unusable.rejected


_EVENTS_AT = 10  # where the array of events begins, after the batch's own head and a double
_MAP_STARTS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_KNOWN_TYPES = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


class _Unusable(Exception):
    def __init__(self, rejection: Rejection, why: str) -> None:
        self.rejected = RejectedEvent(rejection, why, lossy=rejection is not Rejection.UNKNOWN_MEDIUM)


def _reject(raw: msgspec.Raw, why: str) -> RejectedEvent:
    """The slow path: is it a type we do not know (harmless, a newer engine's), or a known one gone wrong?"""
    try:
        value = decode_any(raw)
    except FOREIGN_ERRORS:
        return RejectedEvent(Rejection.MALFORMED, why[:256])
    tag = value.get("type") if isinstance(value, dict) else value[0] if isinstance(value, list) and value else None
    if isinstance(tag, str) and tag not in _KNOWN_TYPES:
        return RejectedEvent(Rejection.UNKNOWN_TYPE, f"event type {tag[:64]!r} is not known", lossy=False)
    return RejectedEvent(Rejection.MALFORMED, why[:256])


def _stored(event: _Stored) -> BlockStored:
    hashes, parent = event.block_hashes, event.parent_block_hash
    if not 0 <= event.block_size <= BLOCK_SIZE_MAX:
        raise _Unusable(Rejection.MALFORMED, f"block_size: {event.block_size} is not in 0..{BLOCK_SIZE_MAX}")
    window = event.kv_cache_spec_sliding_window
    if window is not None and not 0 < window < 1 << 31:
        raise _Unusable(Rejection.MALFORMED, f"kv_cache_spec_sliding_window: {window} is not a number of tokens")
    full = [h for h in hashes if type(h) is bytes] if hashes and type(hashes[0]) is bytes else None
    return BlockStored(
        keys=_keys(hashes),
        full=full if full and len(full) == len(hashes) else None,
        parent=None if parent is None else _key(parent),
        parent_full=parent if isinstance(parent, bytes) else None,
        block_size=event.block_size,
        medium=_medium(event.medium),
        group=_group(event.group_idx),
        kind=event.kv_cache_spec_kind,
        window=window,
        lora_id=event.lora_id if isinstance(event.lora_id, int) else None,
        lora_name=event.lora_name if event.lora_name is not None else _text(event.lora_id),
        raw_token_ids=event.token_ids,
        raw_extra_keys=event.extra_keys,
    )


def _text(value: int | str | None) -> str | None:
    return value if isinstance(value, str) else None


def _key(value: int | bytes) -> int:
    if type(value) is int:
        return value & KEY_MASK
    if len(value) < 8:  # type: ignore[arg-type]
        raise _Unusable(Rejection.MALFORMED, f"a block hash of {len(value)} bytes")  # type: ignore[arg-type]
    return int.from_bytes(value[-8:], "big")  # type: ignore[index]


def _keys(hashes: list[int | bytes]) -> list[int]:
    try:
        if not hashes or min(hashes) >= 0:  # type: ignore[operator]
            return hashes  # type: ignore[return-value]
    except TypeError:  # among them are bytes, which do not compare with a number
        pass
    return [_key(h) for h in hashes]


def _medium(name: str | None) -> Medium:
    medium = _MEDIA.get(name) or _MEDIA.get(name.upper() if name else None)
    if medium is None:
        raise _Unusable(Rejection.UNKNOWN_MEDIUM, f"medium {(name or '')[:64]!r} is not known")
    return medium


def _group(index: int | None) -> int:
    if index is None:
        return 0
    if not 0 <= index <= GROUP_MAX:
        raise _Unusable(Rejection.MALFORMED, f"group_idx: {index} is not in 0..{GROUP_MAX}")
    return index


def decode_seq(frame: bytes) -> int:
    """u64, big-endian. Raises `MalformedBatch`."""
    if len(frame) != 8:
        raise MalformedBatch(f"sequence frame: {len(frame)} bytes, not 8")
    return int.from_bytes(frame, "big")


def decode_topic(frame: bytes) -> Topic:
    """Raises `MalformedBatch` that says what a topic looks like."""
    try:
        text = frame.decode()
        prefix, host_port, model = text.split("@", 2)
        host, port = _host_port(host_port)
    except ValueError:
        raise MalformedBatch(f"topic {frame[:128]!r} is not kv@<host>[:port]@<model>") from None
    if prefix != "kv" or not model or not model.isprintable() or len(text) > 512:
        raise MalformedBatch(f"topic {frame[:128]!r} is not kv@<host>[:port]@<model>")
    return Topic(host, port, model)


_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_HOST_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(:(?P<port>[0-9]{1,5}))?")


def _host_port(text: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[v6]`, `[v6]:port`, or a bare IPv6 address; IPv6 comes back in brackets, in short form.

    Raises `ValueError`: a name that is no host would be an engine that no router could be told of.
    """
    if text.count(":") > 1 and not text.startswith("["):
        return _v6(text), None
    found = _HOST_PORT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    host = found["host"]
    if host.startswith("["):
        host = _v6(host[1:-1])
    elif not _HOST.fullmatch(host):
        raise ValueError(text)
    if found["port"] is None:
        return host, None
    if not 0 < int(found["port"]) < 65536:
        raise ValueError(text)
    return host, int(found["port"])


def _v6(text: str) -> str:
    return f"[{ipaddress.IPv6Address(text)}]"
