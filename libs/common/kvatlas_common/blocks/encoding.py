"""The bytes a block is hashed as: `(parent, tokens, extra)` as canonical CBOR or as pickle protocol 5.

Source: vLLM 0.32 utils/hashing.py and v1/core/kv_cache_utils.py; `sha256_cbor_64bit`: 0.10 utils.

*CBOR.* Serialised, a block is `opening | parent | mid | tokens | tail`, where only the parent must wait for the block
before. `cbor_bodies` therefore writes the tokens of all blocks at once with numpy, which is four times faster than a
serialiser called once per block, and cuts the constant parts out of the plain serialisation of a block of zeros.

*Pickle* is left to Python's own: in C, it is as fast as numpy would be. But it writes a repeated *object* as a
reference, not a repeated *value*. Inside an engine the tags of extra keys are constants, and so one object each; every
other string came in a message and is an object of its own. `as_in_engine` restores just that, so that bytes depend on
values alone.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cbor2
import numpy as np
import numpy.typing as npt
import xxhash

from kvatlas_common.blocks.extras import TAGS, Extra
from kvatlas_common.blocks.profile import Algorithm

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One algorithm: how it writes a value down, how it hashes that, and what of it the next block is chained to.

    `state_bytes`: length of a block's state, which is the hash, or the 64 bits that 0.10 keeps of it.
    """

    dumps: Callable[[Any], bytes]
    digest: Callable[[bytes], bytes]
    state_bytes: int
    cbor: bool
    integer_parent: bool = False

    def block(self, parent: bytes, tokens: tuple[int, ...], extra: Extra | None) -> bytes:
        """The bytes hashed for one block; `extra` as `as_in_engine` returns it."""
        return self.dumps((int.from_bytes(parent, "big") if self.integer_parent else parent, tokens, extra))

    def inscribe(self, parent: bytes) -> bytes:
        """The bytes of `block` that differ from parent to parent."""
        if not self.integer_parent:
            return parent
        return b"\x1b" + parent if parent[:4] != b"\0\0\0\0" else cbor2.dumps(int.from_bytes(parent, "big"))

    def around_parent(self, tokens: tuple[int, ...], extra: Extra | None) -> tuple[bytes, bytes]:
        """The bytes of `block` before and after what `inscribe` writes."""
        parent = b"\xff" * self.state_bytes
        before, _, after = self.block(parent, tokens, extra).partition(self.inscribe(parent))
        return before, after


def _dumps_cbor(value: Any) -> bytes:
    return cbor2.dumps(value, canonical=True)


def _dumps_pickle(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


def _sha256(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def _sha256_64bit(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()[-8:]


SCHEMES = {
    Algorithm.SHA256_CBOR_64BIT: Scheme(_dumps_cbor, _sha256_64bit, 8, cbor=True, integer_parent=True),
    Algorithm.SHA256_CBOR: Scheme(_dumps_cbor, _sha256, 32, cbor=True),
    Algorithm.SHA256: Scheme(_dumps_pickle, _sha256, 32, cbor=False),
    Algorithm.XXHASH_CBOR: Scheme(_dumps_cbor, xxhash.xxh3_128_digest, 16, cbor=True),
    Algorithm.XXHASH: Scheme(_dumps_pickle, xxhash.xxh3_128_digest, 16, cbor=False),
}


def as_in_engine(extra: Extra | None) -> Extra | None:
    """The same values: tags one object each, every other string an object of its own."""
    return None if extra is None else tuple(map(_item, extra))


def _item(item: Any) -> Any:
    if not isinstance(item, tuple):
        return _own(item)
    if item and item[0] in TAGS:
        return (TAGS[TAGS.index(item[0])], *map(_own, item[1:]))
    return tuple(map(_own, item))


def _own(value: Any) -> Any:
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass") if isinstance(value, str) else value


def cbor_bodies(
    scheme: Scheme, tokens: Tokens, block_size: int, extra: Extra | None
) -> tuple[bytes, list[bytes]] | None:
    """What `around_parent` gives for every block of `tokens`, int64[n x block_size], n > 0: before (all), after (each).

    None for tokens that this does not write: negative ones, and those of 33 bits and more.
    """
    if int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 32:
        return None
    cells, present = _cbor_cells(tokens)
    ends = np.cumsum(np.count_nonzero(present.reshape(-1, 5 * block_size), axis=1)).tolist()
    flat = cells[present].tobytes()
    opening, rest = scheme.around_parent((0,) * block_size, extra)  # a zero is one byte
    tail_at = len(rest) - len(scheme.dumps(extra))
    mid, tail = rest[: tail_at - block_size], rest[tail_at:]
    return opening, [mid + flat[start:end] + tail for start, end in pairwise([0, *ends])]


def _cbor_cells(tokens: Tokens) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Each token right-aligned in five cells, and which of them are there.

    A token below 24 is one byte; else a head for its width (0x18, 0x19, 0x1a) and 1, 2 or 4 bytes, big-endian.
    """
    cells, present = np.empty((len(tokens), 5), np.uint8), np.empty((len(tokens), 5), np.bool_)
    two, three, five = tokens >= 24, tokens >= 1 << 8, tokens >= 1 << 16
    cells[:, 1:] = tokens.astype(">u4").view(np.uint8).reshape(-1, 4)
    cells[:, 0] = 0x1A
    cells[:, 2][~five] = 0x19
    cells[:, 3][~three] = 0x18
    present[:, 4] = True
    present[:, 3] = two
    present[:, 2] = three
    present[:, 1] = present[:, 0] = five
    return cells, present
