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
"""

from __future__ import annotations

from kvatlas_common.events.types import array_length

STAND_IN = b"\xc4\x10no token ids yet"
"""16 bytes, as msgpack writes them."""
WORTH_BYTES = 1024
"""In a message shorter than that, walking over them costs no more."""

_NAME = b"\xa9token_ids"
_NEXT = b"\xaablock_size"
_ITEM_BYTES_MAX = 9


def taken_out(payload: bytes) -> tuple[bytes, list[bytes]] | None:
    """The message with stand-ins, and what they stand for, in order; None where it is not as vLLM writes it.

    From the end, as the array is long and looking backwards for a name is four times as fast.
    """
    if len(payload) < WORTH_BYTES:
        return None
    parts, taken, end = list[bytes](), list[bytes](), len(payload)
    following = payload.rfind(_NEXT)
    while following >= 0:
        before = payload.rfind(_NEXT, 0, following)
        start = payload.find(_NAME, max(before, 0), following) + len(_NAME)
        tokens = payload[start:following]
        if start < len(_NAME) or not _may_be_array(tokens):
            return None
        taken.append(tokens)
        parts += (payload[following:end], STAND_IN)
        following, end = before, start
    parts.append(payload[:end])
    parts.reverse()
    taken.reverse()
    spared = b"".join(parts)
    return (spared, taken) if spared.count(STAND_IN) == len(taken) > 0 else None


def _may_be_array(raw: bytes) -> bool:
    return raw[:1] == b"\x90" or 0 < array_length(raw) < len(raw) <= _ITEM_BYTES_MAX * array_length(raw) + 5
