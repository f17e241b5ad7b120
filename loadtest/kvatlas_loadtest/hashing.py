"""Names of a simulated engine's blocks, by the same hash profile a real engine would use."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas_common.blocks.extras import PromptExtras, prompt_extra
from kvatlas_common.blocks.keys import block_state, extend, root_state
from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, ExtraKeys, HashProfile
from kvatlas_loadtest.kv_events import BlockHash
from kvatlas_loadtest.kv_events import ExtraKeys as PublishedExtraKeys


class PromptChain:
    """Hashes of one prompt's blocks, front to back: 64-bit integers, or whole hashes where `as_bytes`."""

    def __init__(self, profile: HashProfile, extras: PromptExtras, as_bytes: bool = False) -> None:
        self._profile = profile
        self._extras = extras
        self._as_bytes = as_bytes
        self._state = root_state(profile)
        self._first = True

    def extend(self, token_ids: Sequence[int]) -> Sequence[BlockHash]:
        """Hashes of the next blocks. `token_ids`: whole blocks, continuing those of the calls before."""
        if self._as_bytes:
            return self._extend_bytes(token_ids)
        keys, self._state = extend(self._profile, self._state, token_ids, self._extras, self._first)
        self._first = False
        named: list[int] = keys.tolist()
        return named

    def _extend_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        size = self._profile.block_size
        states = []
        for start in range(0, len(token_ids), size):
            extra = prompt_extra(self._profile.extra_keys, self._extras, self._first)
            self._state = block_state(self._profile, self._state, token_ids[start : start + size], extra)
            self._first = False
            states.append(self._state)
        return states


def published_extra_keys(extras: PromptExtras) -> tuple[PublishedExtraKeys, PublishedExtraKeys]:
    """Extra keys of the first block and of every other, as events carry them: untagged, the adapter by name."""
    lora = (extras.lora.name,) if extras.lora else ()
    first = (*lora, extras.cache_salt) if extras.cache_salt else lora
    return first or None, lora or None


def profile_of(algorithm: str, seed: str | None, block_size: int, extra_keys: ExtraKeys) -> HashProfile:
    """A profile from an engine's options. `seed` None: `PYTHONHASHSEED` is not set.

    Raises `ValueError` for an unknown algorithm, and where vLLM would draw a random seed: nobody could repeat its keys.
    """
    if algorithm not in list(Algorithm):
        raise ValueError(f"hash algorithm {algorithm!r} is none of {', '.join(Algorithm)}")
    if seed is None:
        if extra_keys is not ExtraKeys.TAGGED or algorithm.startswith("xxhash"):
            raise ValueError(f"{algorithm} of this version starts from a random seed: give a hash seed")
        seed = FIXED_SEED
    return HashProfile(Algorithm(algorithm), seed, block_size, extra_keys)
