"""Tokens and block keys of prompt prefixes seen before, reused exactly, in bounded memory.

Prompts are sequences of *pieces* whose tokens depend on nothing that follows them (`special_tokens` says when), so that
all prompts together form a tree: a `Segment` is one piece in its context, with its tokens. Per hash profile and extras
it has a `Chain`: the keys of the blocks that end in it, and the state the next block is chained to. A prompt costs only
what lies beyond the deepest segment known.

Everything is one least-recently-used list, counted in bytes; when it is full the oldest go. A path is touched from its
end to its root, each chain before its segment, so the oldest entry never has anything younger hanging on it, and
dropping it never cuts a live prefix.

Not for several threads at once.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import Keys, extend, root_state
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.prompts.requests import TokenIds

Piece = str | bytes
"""A piece of text, or of token ids (uint32, native order)."""

Label = tuple[HashProfile, PromptExtras]
"""All that keys depend on besides tokens."""

CHUNK_TOKENS = 1024
"""How prompts that come as token ids are cut."""

_SEGMENT_BYTES, _CHAIN_BYTES = 600, 550  # of the objects around text, ids and keys: CPython 3.11, measured, rounded up


class Segment:
    """One piece after all those before it. `ids`: its tokens, uint32[n]; `end`: tokens up to and with it."""

    __slots__ = ("below", "end", "home", "ids", "piece", "size")

    def __init__(self, piece: Piece, ids: TokenIds, start: int, home: dict[Piece, Segment]) -> None:
        self.piece = piece
        self.ids = ids
        self.end = start + len(ids)
        self.home = home
        self.below: dict[Piece, Segment] = {}
        self.size = _SEGMENT_BYTES + sys.getsizeof(piece) + (ids.nbytes if isinstance(piece, str) else 0)


class Chain:
    """Keys of the blocks that end in a segment, uint64[n], n > 0, and the state of the last of them."""

    __slots__ = ("keys", "label", "segment", "size", "state")

    def __init__(self, label: Label, segment: Segment, keys: Keys, state: bytes) -> None:
        self.label = label
        self.segment = segment
        self.keys = keys
        self.state = state
        self.size = _CHAIN_BYTES + keys.nbytes


class PrefixCache:
    """`bytes_max` bounds what is kept; one prompt larger than that is still answered, and forgotten."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._roots: dict[Piece, Segment] = {}
        self._chains: dict[Label, dict[Segment, Chain]] = {}
        self._recent: OrderedDict[Segment | Chain, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recent)

    def follow(self, pieces: Iterable[Piece], encode: Callable[[str], TokenIds]) -> tuple[tuple[Segment, ...], int]:
        """The path of a prompt, and how many of its tokens were known. `encode` gives the ids of a piece of text."""
        path: list[Segment] = []
        below, end, reused = self._roots, 0, 0
        for piece in pieces:
            segment = below.get(piece)
            if segment is None:
                ids = np.frombuffer(piece, np.uint32) if isinstance(piece, bytes) else encode(piece)
                segment = Segment(piece, ids, end, below)
                below[piece] = segment
                self._keep(segment)
            else:
                reused = segment.end
            path.append(segment)
            below, end = segment.below, segment.end
        self._touch(path, {})
        self._shrink()
        return tuple(path), reused

    def keys(self, path: Sequence[Segment], token_ids: TokenIds, profile: HashProfile, extras: PromptExtras) -> Keys:
        """Keys of all whole blocks of a path, uint64[n]; `token_ids`: all its tokens. Raises `UnknownExtra`."""
        label, state, done = (profile, extras), root_state(profile), 0
        known = self._chains.get(label, {})
        chains: list[Chain] = []
        for segment in path:
            ends = segment.end // profile.block_size * profile.block_size
            if ends == done:
                continue
            chain = known.get(segment)
            if chain is None:
                keys, state = extend(profile, state, token_ids[done:ends], extras, first=done == 0)
                chain = Chain(label, segment, keys, state)
                if segment in self._recent:  # not if it has been dropped since the path was followed
                    known = self._chains.setdefault(label, known)
                    known[segment] = chain
                    self._keep(chain)
            chains.append(chain)
            state, done = chain.state, ends
        self._touch(path, {chain.segment: chain for chain in chains})
        self._shrink()
        return np.concatenate([chain.keys for chain in chains]) if chains else np.empty(0, np.uint64)

    def _touch(self, path: Sequence[Segment], chains: Mapping[Segment, Chain]) -> None:
        for segment in reversed(path):
            if segment in self._recent:
                if (chain := chains.get(segment)) is not None:
                    self._recent.move_to_end(chain)
                self._recent.move_to_end(segment)

    def _keep(self, entry: Segment | Chain) -> None:
        self._recent[entry] = None
        self.bytes += entry.size

    def _shrink(self) -> None:
        while self.bytes > self.bytes_max and self._recent:
            entry, _ = self._recent.popitem(last=False)
            self.bytes -= entry.size
            if isinstance(entry, Segment):
                del entry.home[entry.piece]
                continue
            chains = self._chains[entry.label]
            del chains[entry.segment]
            if not chains:
                del self._chains[entry.label]


def chunks(token_ids: TokenIds) -> list[Piece]:
    """Token ids as pieces of `CHUNK_TOKENS`."""
    return [token_ids[at : at + CHUNK_TOKENS].tobytes() for at in range(0, len(token_ids), CHUNK_TOKENS)]
