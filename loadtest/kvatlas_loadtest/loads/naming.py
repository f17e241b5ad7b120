"""Block keys of a load's prompts and answers, without any text: as cheap as a lookup, and as telling.

A key stands for all that comes before it, so two prompts share keys exactly as far as they are the same segments. The
first block of a prompt has real tokens and its real hash: that is what an index verifies an engine's hash profile by.
All other keys are a chain of xxh3 hashes over (key before, segment, offset); nobody can tell them from real ones by
looking at events with integer hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import extend, root_state
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_loadtest.loads.arrivals import Arrival, flattened

_VOCABULARY = 150_000
_pack_run = struct.Struct("<QQQ").pack
_pack_piece = struct.Struct("<QQQ").pack

Piece = tuple[int, int, int]
"""(name of a segment or an answer, first token, tokens): part of a block."""


@dataclass(frozen=True, slots=True)
class Named:
    """A prompt and its answer. `keys`: of all their whole blocks; `root`: tokens of the first, or none."""

    prompt_tokens: int
    keys: Sequence[int]
    root: Sequence[int]

    def lookup(self, block_size: int) -> Sequence[int]:
        """Keys an engine may serve from its cache: it always computes the last token."""
        return self.keys[: (self.prompt_tokens - 1) // block_size]


@dataclass(frozen=True, slots=True)
class _State:
    """After some parts of a prompt: whole blocks so far, and the pieces of the block under way."""

    keys: tuple[int, ...]
    pieces: tuple[Piece, ...]
    filled: int
    root: tuple[int, ...]


class BlockNames:
    """Of one load, by one hash profile. Prompts that begin alike are named once."""

    def __init__(self, profile: HashProfile, arrivals: Sequence[Arrival]) -> None:
        self.profile = profile
        self._size = profile.block_size
        self._arrivals = arrivals
        self._begun: dict[tuple[str | None, tuple[Piece, ...]], _State] = {}
        self._roots: dict[tuple[str | None, tuple[Piece, ...]], tuple[int, tuple[int, ...]]] = {}

    def of(self, index: int) -> Named:
        """Prompt and answer of one arrival."""
        arrival = self._arrivals[index]
        parts = tuple((_name(kind, seed), 0, tokens) for kind, seed, tokens in flattened(self._arrivals, index))
        state = self._named(arrival.salt, parts)
        prompt_tokens = len(state.keys) * self._size + state.filled
        whole = self._extended(state, (_name("answer", index), 0, arrival.output_tokens), arrival.salt)
        return Named(prompt_tokens, whole.keys, whole.root)

    def _named(self, salt: str | None, parts: tuple[Piece, ...]) -> _State:
        """From the longest beginning that was named before; every beginning that ends with a part is kept."""
        if not parts:
            return _State((), (), 0, ())
        known = self._begun.get((salt, parts))
        if known is None:
            known = self._extended(self._named(salt, parts[:-1]), parts[-1], salt)
            self._begun[salt, parts] = known
        return known

    def _extended(self, state: _State, part: Piece, salt: str | None) -> _State:
        size, (name, at, end) = self._size, part
        keys, pieces, filled, root = list(state.keys), state.pieces, state.filled, state.root
        while at < end:
            if not filled and keys and end - at >= size:  # whole blocks of one segment: most are
                key = keys[-1]
                whole = at + (end - at) // size * size
                for first in range(at, whole, size):
                    key = xxhash.xxh3_64_intdigest(_pack_run(key, name, first))
                    keys.append(key)
                at = whole
                continue
            taken = min(size - filled, end - at)
            pieces, filled, at = (*pieces, (name, at, taken)), filled + taken, at + taken
            if filled == size:
                if keys:
                    keys.append(self._key(keys[-1], pieces))
                else:
                    key, root = self._root(salt, pieces)
                    keys.append(key)
                pieces, filled = (), 0
        return _State(tuple(keys), pieces, filled, root)

    def _key(self, parent: int, pieces: Sequence[Piece]) -> int:
        if len(pieces) == 1:
            name, first, _ = pieces[0]
            return xxhash.xxh3_64_intdigest(_pack_run(parent, name, first))
        content = b"".join(_pack_piece(*piece) for piece in pieces)
        return xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + content)

    def _root(self, salt: str | None, pieces: tuple[Piece, ...]) -> tuple[int, tuple[int, ...]]:
        """Key and tokens of a first block. The tokens follow from what it is made of; the salt is in the hash only."""
        known = self._roots.get((salt, pieces))
        if known is None:
            content = b"".join(_pack_piece(*piece) for piece in pieces)
            tokens = tuple(xxhash.xxh3_64_intdigest(content, seed) % _VOCABULARY for seed in range(self._size))
            keys, _ = extend(self.profile, root_state(self.profile), tokens, PromptExtras(cache_salt=salt), first=True)
            known = self._roots[salt, pieces] = int(keys[0]), tokens
        return known


def _name(kind: str, number: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{kind}:{number}")
