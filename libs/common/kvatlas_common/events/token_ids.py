"""Token ids taken out of a message before it is decoded: they are most of its bytes, and nobody may ever ask for them.

Msgpack does not say how long an array is in bytes, so whoever decodes a message walks over every token id: of a message
of 6,000 that is nine tenths of the work. But an event that is a map names its fields, and vLLM writes `token_ids` right
before `block_size`: from one name to the other is found at the speed of memory. A stand-in takes their place, and the
decoder says whether it came out as the token ids of its event.

What stands between the names is exactly the value of `token_ids`, or the message is not taken apart (it is decoded as
it came). In a message that is well-formed both names occur once per event, where the field is: a prompt whose token ids
happen to spell a name makes it occur once more. And were it not one value, the maps and arrays around it would not have
as many items as they say. Only bytes that are no msgpack at all, within an array of token ids, are no longer seen when
the message is decoded, but when somebody asks for the token ids. It costs nothing: the hashes of the blocks are beside.

Most messages have one such array, however many events: it stands between the first name and the last, and neither is
far from its end of the message. So that is tried first, and nobody reads the token ids even to find their end. Where it
is wrong the message lacks events, or is none, and the decoder says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from kvatlas_common.events.types import array_length

STAND_IN = b"\xc4\x10no token ids yet"
"""16 bytes, as msgpack writes them."""
WORTH_BYTES = 1024
"""In a message shorter than that, walking over them costs no more."""

_NAME = b"\xa9token_ids"
_NEXT = b"\xaablock_size"
_ITEM_BYTES_MAX = 9
_TOKEN_BYTES_MAX = 5  # of an id below 2**32: what is longer for its length is no one array
_HEAD_BYTES_MAX = 5


Spared: TypeAlias = tuple[bytes, list[memoryview]]
"""The message with stand-ins, and what they stand for, in order."""


def taken_out(payload: bytes) -> Iterator[Spared]:
    """The ways to take it apart, the likeliest first; none where it is not as vLLM writes it."""
    if len(payload) >= WORTH_BYTES and (last := payload.rfind(_NEXT)) >= 0:
        if (one := _one(payload, last)) is not None:
            yield one
        if (several := _several(payload, last)) is not None:
            yield several


def _one(payload: bytes, following: int) -> Spared | None:
    """As if all from the first name to the last were the token ids of one event."""
    start = payload.find(_NAME, 0, following) + len(_NAME)
    tokens = memoryview(payload)[start:following]
    if start < len(_NAME) or not _may_be_array(tokens, _TOKEN_BYTES_MAX):
        return None
    spared = payload[:start] + STAND_IN + payload[following:]
    return (spared, [tokens]) if spared.count(STAND_IN) == 1 else None


def _several(payload: bytes, following: int) -> Spared | None:
    """From the end, as the arrays are long and looking backwards for a name is four times as fast."""
    whole, parts, taken, end = memoryview(payload), list[bytes](), list[memoryview](), len(payload)
    while following >= 0:
        before = payload.rfind(_NEXT, 0, following)
        start = payload.find(_NAME, max(before, 0), following) + len(_NAME)
        tokens = whole[start:following]
        if start < len(_NAME) or not _may_be_array(tokens, _ITEM_BYTES_MAX):
            return None
        taken.append(tokens)
        parts += (payload[following:end], STAND_IN)
        following, end = before, start
    parts.append(payload[:end])
    parts.reverse()
    taken.reverse()
    spared = b"".join(parts)
    return (spared, taken) if spared.count(STAND_IN) == len(taken) > 0 else None


def _may_be_array(raw: memoryview, item_bytes_max: int) -> bool:
    items = array_length(raw)
    return items < len(raw) <= item_bytes_max * items + _HEAD_BYTES_MAX and (items > 0 or raw[0] == 0x90)
