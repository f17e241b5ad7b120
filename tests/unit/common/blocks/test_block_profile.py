import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.blocks.profile import (
    BLOCK_SIZE_MAX,
    SEED_CHARS_MAX,
    Algorithm,
    ExtraKeys,
    HashProfile,
    recomputed,
)

profiles = st.builds(
    HashProfile,
    st.sampled_from(Algorithm),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.integers(1, BLOCK_SIZE_MAX),
    st.sampled_from(ExtraKeys),
)


@given(profiles)
def test_a_name_parses_back_to_its_profile(profile: HashProfile) -> None:
    assert HashProfile.parse(profile.name) == profile


def test_the_name_is_readable_and_the_seed_may_contain_anything() -> None:
    profile = HashProfile(Algorithm.SHA256_CBOR, "42", 64, ExtraKeys.TAGGED)
    assert profile.name == "sha256_cbor/b64/tagged/seed=42"
    assert HashProfile.parse("xxhash/b16/lora-id/seed=a/b16/seed=\n").seed == "a/b16/seed=\n"
    assert HashProfile.parse("xxhash/b16/lora-id/seed=").seed == ""


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "'' is not <algorithm>/b<block size>/<extra keys>/seed=<seed>"),
        ("sha256_cbor/64/tagged/seed=42", "is not <algorithm>"),
        ("sha256_cbor/b064/tagged/seed=42", "is not <algorithm>"),
        ("sha256_cbor/b٦٤/tagged/seed=42", "is not <algorithm>"),
        ("sha256_cbor/b64/tagged", "is not <algorithm>"),
        ("md5/b64/tagged/seed=42", "algorithm is none of sha256_cbor_64bit, sha256_cbor, sha256,"),
        ("sha256/b64/flat/seed=42", "extra keys are none of lora-id, lora-name, tagged"),
        ("sha256/b9999999999/tagged/seed=42", "block size 9999999999 is not within 1..1048576"),
        ("sha256/b64/tagged/seed=" + "x" * (SEED_CHARS_MAX + 1), "a seed of 1025 characters, 1024 at most"),
        ("sha256/b64/tagged/seed=\ud800", "the seed is not valid Unicode"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        HashProfile.parse(name)


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="block size 0"):
        HashProfile(Algorithm.SHA256, "0", 0, ExtraKeys.TAGGED)


def test_recomputed_keys_of_two_block_sizes_are_two_profiles() -> None:
    assert recomputed(16) != recomputed(32)
    assert HashProfile.parse(recomputed(16).name) == recomputed(16)
