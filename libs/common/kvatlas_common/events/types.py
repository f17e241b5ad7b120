"""KV events as types: what an engine says of its cache, whichever vLLM it is.

Structs, not dataclasses: making a frozen dataclass of 13 fields takes 3.7 us, a struct 0.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeAlias

import msgspec

from kvatlas_common.words import Medium

FOREIGN_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, MemoryError)
"""All that msgspec raises on bytes nobody meant for it."""

_decode_tokens = msgspec.msgpack.Decoder(list[int]).decode
decode_any = msgspec.msgpack.Decoder().decode


def array_length(raw: msgspec.Raw | memoryview | bytes) -> int:
    """How many items a msgpack array has, from its header alone; 0 where it is none."""
    head = memoryview(raw)
    start, size = head[0] if head else 0, len(head)
    if start == 0xDC and size >= 3:
        return head[1] << 8 | head[2]
    if 0x90 <= start <= 0x9F:
        return start & 0x0F
    if start == 0xDD and size >= 5:
        return int.from_bytes(head[1:5], "big")
    return 0


@lru_cache(maxsize=256)
def _nils(count: int) -> bytes:
    """`count` is of an array that is there: no more than it has bytes."""
    return msgspec.msgpack.encode([None] * count)


class Rejection(StrEnum):
    """Why one event of a batch could not be used: the label of a counter, so there are few of them."""

    UNKNOWN_TYPE = "unknown-type"
    UNKNOWN_MEDIUM = "unknown-medium"
    MALFORMED = "malformed"


class MalformedBatch(ValueError):
    """The message as a whole cannot be read: nothing of it was applied."""


@dataclass(frozen=True, slots=True)
class RejectedEvent:
    """One event that cannot be used. `lossy`: it may have changed the cache, so the index may now be wrong."""

    rejection: Rejection
    why: str
    lossy: bool = True


@dataclass(frozen=True, slots=True)
class Topic:
    """`kv@<host>[:port]@<model>`: who a listened message says it comes from."""

    host: str
    port: int | None
    model: str


class BlockStored(msgspec.Struct, frozen=True, gc=False):
    """Blocks an engine now holds. `keys[i]` is the low 64 bits of hash i; `full[i]` all of it where bytes were sent.

    Odd shapes are legal: `token_ids()` may be longer than `keys` cover (window groups skip blocks), or empty with
    `block_size` 0 (offload tiers); `parent` may be None mid-prompt.
    """

    keys: Sequence[int]
    full: Sequence[bytes] | None
    parent: int | None
    parent_full: bytes | None
    block_size: int
    medium: Medium
    group: int
    kind: str | None
    window: int | None
    lora_id: int | None
    lora_name: str | None
    raw_token_ids: msgspec.Raw
    raw_extra_keys: msgspec.Raw

    def token_ids(self) -> list[int]:
        """Raises `MalformedBatch` when they are not a list of integers."""
        try:
            return _decode_tokens(self.raw_token_ids)
        except FOREIGN_ERRORS as error:
            raise MalformedBatch(f"token_ids: {error}") from None

    @property
    def token_count(self) -> int:
        """How many token ids there are; they are not decoded for it."""
        return array_length(self.raw_token_ids)

    @property
    def says_extra_keys(self) -> bool:
        """Whether the encoding has the field at all: without it (before vLLM 0.22) salts cannot be seen."""
        return len(bytes(self.raw_extra_keys)) > 0

    @property
    def is_plain(self) -> bool:
        """Whether it says of every block that it has no extra keys, as most do; they are not decoded for it."""
        return bytes(self.raw_extra_keys) == _nils(array_length(self.raw_extra_keys))

    def extra_keys(self) -> list[Sequence[Any] | None] | None:
        """Per block None or the untagged extra keys; None when the event says nothing of them."""
        raw = bytes(self.raw_extra_keys)
        if not raw:
            return None
        try:
            value = decode_any(raw)
        except FOREIGN_ERRORS as error:
            raise MalformedBatch(f"extra_keys: {error}") from None
        if value is None:
            return None
        if not isinstance(value, list) or not all(e is None or isinstance(e, list) for e in value):
            raise MalformedBatch("extra_keys: not a list of lists")
        return value


class BlockRemoved(msgspec.Struct, frozen=True, gc=False):
    keys: Sequence[int]
    medium: Medium
    group: int


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    pass


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


def between_clears(events: Sequence[Event]) -> list[tuple[bool, Sequence[BlockStored | BlockRemoved]]]:
    """The runs of events between clears, and whether a clear comes before."""
    runs: list[tuple[bool, list[BlockStored | BlockRemoved]]] = [(False, [])]
    for event in events:
        if isinstance(event, AllBlocksCleared):
            runs.append((True, []))
        else:
            runs[-1][1].append(event)
    return [*runs]


def with_removals_joined(events: Sequence[BlockStored | BlockRemoved]) -> Iterable[BlockStored | BlockRemoved]:
    """Removals from one place that come one after the other as one: engines drop blocks one by one."""
    return events if len(events) == 1 else _joined(events)


def _joined(events: Sequence[BlockStored | BlockRemoved]) -> Iterator[BlockStored | BlockRemoved]:
    for place, some in groupby(events, _removed_from):
        first, *more = some
        if place is None or not more:
            yield from (first, *more)
        else:
            yield BlockRemoved([key for event in (first, *more) for key in event.keys], *place)


def _removed_from(event: BlockStored | BlockRemoved) -> tuple[Medium, int] | None:
    return (event.medium, event.group) if type(event) is BlockRemoved else None


class EventBatch(msgspec.Struct, frozen=True, gc=False):
    """One message: `ts` in seconds since the epoch by the engine's clock; `rank` None when it does not say."""

    ts: float
    rank: int | None
    events: tuple[Event, ...]
    rejected: tuple[RejectedEvent, ...] = ()
