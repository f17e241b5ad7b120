"""Which hash profile does an engine use? Tried against blocks it published, which carry tokens and the hash of them.

A root block (parent None) tells: seed, algorithm and extra-key encoding are all in its hash. A seed cannot be
inverted, only tried: the candidates first, then every algorithm with the seeds people set. That is bounded (about 10 ms
for a root of 64 tokens that fits nothing), and one such root proves nothing yet: 0.10 hashes salts that its events do
not show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from kvatlas_common.blocks.encoding import SCHEMES, as_in_engine
from kvatlas_common.blocks.extras import Extra, UnknownExtra, event_extra
from kvatlas_common.blocks.keys import TokenIds, block_state, key_of, root_state
from kvatlas_common.blocks.profile import BLOCK_SIZE_MAX, FIXED_SEED, Algorithm, ExtraKeys, HashProfile

SMALL_SEEDS = tuple(map(str, range(1024)))
CANDIDATES_MAX = 64  # tried of those given; the rest is not looked at
SEEDS_MAX = 256


@dataclass(frozen=True, slots=True)
class RootBlock:
    """The first block of a store with parent None, as an engine published it.

    `tokens`: the block's own, so their number is the block size. `untagged`: its entry of `extra_keys`. `lora_path` is
    not in the event, see `extras.event_extra`. `full`: the whole hash, where the engine publishes bytes.
    """

    key: int
    tokens: Sequence[int]
    untagged: Sequence[Any] | None
    lora_id: int | None
    lora_name: str | None
    lora_path: str | None
    full: bytes | None = None

    def extra(self, encoding: ExtraKeys) -> Extra | None:
        """Raises `UnknownExtra`."""
        return event_extra(encoding, self.untagged, self.lora_id, self.lora_name, self.lora_path)

    def is_hashed(self, state: bytes) -> bool:
        """Whether `state` is this block's, as far as what was published tells."""
        return key_of(state) == self.key if self.full is None else state == self.full


def reproduces(profile: HashProfile, root: RootBlock) -> bool:
    """Whether an engine with this profile would have published this block."""
    if profile.block_size != len(root.tokens):
        return False
    try:
        extra = root.extra(profile.extra_keys)
    except UnknownExtra:
        return False
    return root.is_hashed(block_state(profile, root_state(profile), root.tokens, extra))


def follows(profile: HashProfile, parent_state: bytes, key: int, tokens: TokenIds, extra: Extra | None) -> bool:
    """Whether a block that is no root fits; for where the parent's state is known (`keys.published_state`)."""
    return key_of(block_state(profile, parent_state, tokens, extra)) == key


def discover(root: RootBlock, candidates: Sequence[HashProfile] = (), seeds: Sequence[str] = ()) -> HashProfile | None:
    """The profile that reproduces `root`, or None where none of those tried does.

    Tried, in this order: `candidates` (put first what is configured), with the root's block size; then all algorithms
    with `seeds`, the candidates' seeds, vLLM's fixed one and "0" to "1023". Without extras in the root its encoding is
    not proven: a candidate keeps its own, otherwise it is that of the version the algorithm was seen in (`refine`).
    """
    if not 1 <= len(root.tokens) <= BLOCK_SIZE_MAX:
        return None
    known = [replace(c, block_size=len(root.tokens)) for c in candidates[:CANDIDATES_MAX]]
    for profile in dict.fromkeys(known):
        if reproduces(profile, root):
            return profile
    named = tuple(dict.fromkeys((*seeds[:SEEDS_MAX], *(c.seed for c in known), FIXED_SEED)))
    trials = list(_trials(root))
    return _search(root, trials, named) or _search(root, trials, SMALL_SEEDS)


def refine(profile: HashProfile, root: RootBlock) -> HashProfile | None:
    """The profile with the extra-key encoding that this root proves, its own if it can; None if none fits."""
    for encoding in (profile.extra_keys, *_encodings(profile.algorithm)):
        refined = replace(profile, extra_keys=encoding)
        if reproduces(refined, root):
            return refined
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """A way to hash the root that only lacks a seed: the hashed bytes before and after the parent."""

    algorithm: Algorithm
    encoding: ExtraKeys
    before: bytes
    after: bytes


def _trials(root: RootBlock) -> Iterator[_Trial]:
    """Every algorithm, with each extra-key encoding that makes a difference for this root."""
    tokens = tuple(root.tokens)
    for algorithm, scheme in SCHEMES.items():
        if root.full is not None and len(root.full) != scheme.state_bytes:
            continue
        seen: list[Extra | None] = []
        for encoding in _encodings(algorithm):
            try:
                extra = root.extra(encoding)
            except UnknownExtra:
                continue
            if extra not in seen:
                seen.append(extra)
                yield _Trial(algorithm, encoding, *scheme.around_parent(tokens, as_in_engine(extra)))


def _search(root: RootBlock, trials: Sequence[_Trial], seeds: tuple[str, ...]) -> HashProfile | None:
    for trial in trials:
        digest, before, after = SCHEMES[trial.algorithm].digest, trial.before, trial.after
        for seed, parent in zip(seeds, _inscribed_roots(trial.algorithm, seeds), strict=True):
            if root.is_hashed(digest(before + parent + after)):
                return HashProfile(trial.algorithm, seed, len(root.tokens), trial.encoding)
    return None


def _inscribed_roots(algorithm: Algorithm, seeds: tuple[str, ...]) -> tuple[bytes, ...]:
    return _small_roots(algorithm) if seeds is SMALL_SEEDS else _roots(algorithm, seeds)


@lru_cache(maxsize=len(Algorithm))
def _small_roots(algorithm: Algorithm) -> tuple[bytes, ...]:
    return _roots(algorithm, SMALL_SEEDS)


def _roots(algorithm: Algorithm, seeds: Iterable[str]) -> tuple[bytes, ...]:
    """The root state of each seed, as it is written into the bytes of a block."""
    scheme = SCHEMES[algorithm]
    return tuple(scheme.inscribe(scheme.digest(scheme.dumps(seed))) for seed in seeds)


def _encodings(algorithm: Algorithm) -> tuple[ExtraKeys, ...]:
    """The likeliest first: that of the vLLM version an algorithm was seen in."""
    if algorithm is Algorithm.SHA256_CBOR_64BIT:
        return ExtraKeys.LORA_ID, ExtraKeys.LORA_NAME, ExtraKeys.TAGGED
    return ExtraKeys.TAGGED, ExtraKeys.LORA_NAME, ExtraKeys.LORA_ID
