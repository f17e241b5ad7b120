"""Whatever was seen before and however little is remembered: tokens and keys are those of the plain way."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.extras import Lora, PromptExtras, UnknownExtra
from kvatlas_common.blocks.keys import extend, root_state
from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.prompts.prefixes import CHUNK_TOKENS, Chain, Piece, PrefixCache, Segment, chunks
from kvatlas_common.prompts.requests import TokenIds

PROFILES = [
    HashProfile(Algorithm.SHA256_CBOR, "42", 4, ExtraKeys.TAGGED),
    HashProfile(Algorithm.SHA256, "", 3, ExtraKeys.LORA_NAME),
    HashProfile(Algorithm.SHA256_CBOR_64BIT, "7", 1, ExtraKeys.LORA_ID),
]
EXTRAS = [PromptExtras(), PromptExtras(cache_salt="s"), PromptExtras(Lora("l", 1, "/l"), "t")]
PIECES = st.lists(st.sampled_from(["a", "bc", "def", "ghijk", "x" * 9, b"\1\0\0\0", b"\2\0\0\0" * 7]), max_size=9)
LABELS = st.tuples(st.sampled_from(PROFILES), st.sampled_from(EXTRAS))


def encode(text: str) -> TokenIds:
    return np.array([ord(c) for c in text], np.uint32)


def plain(pieces: list[Piece]) -> list[int]:
    return [i for p in pieces for i in (np.frombuffer(p, np.uint32) if isinstance(p, bytes) else encode(p)).tolist()]


def plain_keys(ids: list[int], profile: HashProfile, extras: PromptExtras) -> list[int]:
    keys: list[int] = extend(profile, root_state(profile), ids, extras, first=True)[0].tolist()
    return keys


def check_books(cache: PrefixCache) -> None:
    """What is counted is what is there, and all of it can be reached from the roots."""
    reachable: set[Segment | Chain] = {c for chains in cache._chains.values() for c in chains.values()}
    below = [cache._roots]
    while below:
        segments = below.pop()
        reachable |= set(segments.values())
        below += [segment.below for segment in segments.values()]
    assert reachable == set(cache._recent)
    assert cache.bytes == sum(entry.size for entry in reachable) <= cache.bytes_max
    assert all(cache._chains.values()), "no label without chains"
    assert all(chain.segment in cache._recent for chain in reachable if isinstance(chain, Chain))


@given(st.lists(st.tuples(PIECES, LABELS, st.integers(0, 3)), max_size=30), st.sampled_from([0, 3_000, 9_000, 1 << 20]))
@settings(max_examples=120, deadline=None)
def test_equal_to_the_plain_way(
    prompts: list[tuple[list[Piece], tuple[HashProfile, PromptExtras], int]], room: int
) -> None:
    cache = PrefixCache(room)
    waiting = []
    for pieces, label, later in prompts:
        path, reused = cache.follow(pieces, encode)
        ids = np.array(plain(pieces), np.uint32)
        assert [i for segment in path for i in segment.ids.tolist()] == ids.tolist()
        assert reused <= len(ids)
        check_books(cache)
        waiting.append((path, ids, label))
        while len(waiting) > later:  # keys may be asked for when the path has been dropped meanwhile
            path, ids, (profile, extras) = waiting.pop(0)
            assert cache.keys(path, ids, profile, extras).tolist() == plain_keys(ids.tolist(), profile, extras)
            check_books(cache)


def test_a_prefix_costs_nothing_the_second_time() -> None:
    encoded = []

    def counting(text: str) -> TokenIds:
        encoded.append(text)
        return encode(text)

    cache = PrefixCache(1 << 20)
    first, reused = cache.follow(["system", "question"], counting)
    assert reused == 0
    second, reused = cache.follow(["system", "other"], counting)
    assert reused == len("system")
    assert encoded == ["system", "question", "other"]
    assert second[0] is first[0]
    assert cache.follow(["system", "question"], counting)[1] == len("systemquestion")


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(5_000)
    cache.follow(["kept", "a"], encode)
    for i in range(50):
        cache.follow([f"passing {i}"], encode)
        cache.follow(["kept", "a"], encode)
    assert cache.follow(["kept", "a"], encode)[1] == len("kepta")
    assert cache.follow(["passing 0"], encode)[1] == 0


def test_a_prompt_larger_than_the_cache_is_answered_and_forgotten() -> None:
    cache = PrefixCache(100)
    path, _ = cache.follow(["a" * 500], encode)
    keys = cache.keys(path, encode("a" * 500), PROFILES[0], EXTRAS[0])
    assert keys.tolist() == plain_keys(plain(["a" * 500]), PROFILES[0], EXTRAS[0])
    assert (len(cache), cache.bytes) == (0, 0)


def test_an_adapter_that_cannot_be_hashed_leaves_nothing_behind() -> None:
    cache = PrefixCache(1 << 20)
    path, _ = cache.follow(["abcdefgh"], encode)
    with pytest.raises(UnknownExtra):
        cache.keys(path, encode("abcdefgh"), PROFILES[0], PromptExtras(Lora("no path")))
    check_books(cache)


def test_chunks_of_token_ids() -> None:
    ids = np.array([random.Random(1).randrange(1 << 32) for _ in range(2 * CHUNK_TOKENS + 5)], np.uint32)
    pieces = chunks(ids)
    assert [len(p) // 4 for p in pieces] == [CHUNK_TOKENS, CHUNK_TOKENS, 5]
    assert plain(pieces) == ids.tolist()
    assert chunks(ids[:0]) == []
