"""Block keys of a prompt, exactly as an engine with a given hash profile computes them.

The definition is `block_state`: one block, one hash, as vLLM writes it; `extend` is the same for all blocks of a
prompt, written faster. A *state* is what the next block is chained to: the hash (32 bytes sha256, 16 xxh3), or the 64
bits that `sha256_cbor_64bit` keeps of it. The key is its last 8 bytes; an engine that publishes integer hashes shows no
more of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvatlas_common.blocks.encoding import SCHEMES, as_in_engine, cbor_bodies
from kvatlas_common.blocks.extras import Extra, PromptExtras, prompt_extra
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.words import BlockKey

Keys = npt.NDArray[np.uint64]
TokenIds = Sequence[int] | npt.NDArray[Any]

NO_EXTRAS = PromptExtras()

PLAIN_TOKENS_MAX = 128
"""So few are written down one block after the other faster than all at once: the markers around a turn of a chat."""


def root_state(profile: HashProfile) -> bytes:
    """The parent of every first block: the hash of the seed string. vLLM 0.32 `init_none_hash`."""
    scheme = SCHEMES[profile.algorithm]
    return scheme.digest(scheme.dumps(profile.seed))


def key_of(state: bytes) -> BlockKey:
    return BlockKey(int.from_bytes(state[-8:], "big"))


def published_state(profile: HashProfile, published: int | bytes) -> bytes | None:
    """The state behind a hash as an engine publishes it; None if an integer does not tell, or the length is wrong."""
    scheme = SCHEMES[profile.algorithm]
    if isinstance(published, bytes):
        return published if len(published) == scheme.state_bytes else None
    return published.to_bytes(8, "big") if scheme.integer_parent and 0 <= published < 1 << 64 else None


def block_state(profile: HashProfile, parent: bytes, tokens: TokenIds, extra: Extra | None) -> bytes:
    """The definition: hash of (parent, tokens, extra). vLLM 0.32 v1/core/kv_cache_utils.py, `hash_block_tokens`."""
    scheme = SCHEMES[profile.algorithm]
    return scheme.digest(scheme.block(parent, _tuple(tokens), as_in_engine(extra)))


def extend(
    profile: HashProfile, parent: bytes, tokens: TokenIds, extras: PromptExtras, first: bool
) -> tuple[Keys, bytes]:
    """Keys, uint64[n], of all n whole blocks of `tokens` after `parent`, and the state of the last (`parent` if none).

    `first`: `tokens` begin the prompt. Raises `UnknownExtra`.
    """
    whole = len(tokens) // profile.block_size * profile.block_size
    opening, extra = (prompt_extra(profile.extra_keys, extras, begins) for begins in (first, False))
    cut = 0 if opening == extra else min(profile.block_size, whole)
    states = _chain(profile, parent, tokens[:cut], opening)
    states += _chain(profile, states[-1] if states else parent, tokens[cut:whole], extra)
    hashes = np.frombuffer(b"".join(states), np.uint8).reshape(-1, SCHEMES[profile.algorithm].state_bytes)
    keys = np.ascontiguousarray(hashes[:, -8:]).view(">u8").reshape(-1).astype(np.uint64)
    return keys, states[-1] if states else parent


def prompt_keys(profile: HashProfile, tokens: TokenIds, extras: PromptExtras = NO_EXTRAS) -> Keys:
    """Keys of the blocks of a prompt that an engine may serve from its cache: it always computes the last token."""
    blocks = max(len(tokens) - 1, 0) // profile.block_size
    return extend(profile, root_state(profile), tokens[: blocks * profile.block_size], extras, first=True)[0]


def _chain(profile: HashProfile, parent: bytes, tokens: TokenIds, extra: Extra | None) -> list[bytes]:
    """States of the blocks of `tokens`, whole blocks all with the same `extra`."""
    if len(tokens) == 0:
        return []
    scheme, size, extra = SCHEMES[profile.algorithm], profile.block_size, as_in_engine(extra)
    digest, state = scheme.digest, parent
    at_once = scheme.cbor and len(tokens) > PLAIN_TOKENS_MAX
    bodies = cbor_bodies(scheme, ids, size, extra) if at_once and (ids := _int64(tokens)) is not None else None
    states: list[bytes] = []
    if bodies is None:
        listed = _tuple(tokens)
        for start in range(0, len(listed), size):
            state = digest(scheme.block(state, listed[start : start + size], extra))
            states.append(state)
        return states
    before, afters = bodies
    inscribe = scheme.inscribe
    for after in afters:
        state = digest(before + inscribe(state) + after)
        states.append(state)
    return states


def _int64(tokens: TokenIds) -> npt.NDArray[np.int64] | None:
    """None where a token does not fit: such a prompt is written the plain way."""
    try:
        return np.asarray(tokens, dtype=np.int64)
    except OverflowError:
        return None


def _tuple(tokens: TokenIds) -> tuple[int, ...]:
    return tuple(tokens.tolist() if isinstance(tokens, np.ndarray) else tokens)
