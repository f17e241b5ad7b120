import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.discover import RootBlock, discover, follows, refine, reproduces
from kvatlas_common.blocks.extras import event_extra
from kvatlas_common.blocks.keys import block_state, key_of, root_state
from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, ExtraKeys, HashProfile

CAPTURED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[3] / "data" / "blocks" / "captures.json").read_text()
)
TAGGED = ExtraKeys.TAGGED
TOKENS = list(range(1000, 1016))


def root(
    profile: HashProfile,
    untagged: list[Any] | None = None,
    lora: tuple[int, str, str] | None = None,
    whole: bool = False,
) -> RootBlock:
    """As an engine with this profile publishes it."""
    number, name, path = lora or (None, None, None)
    tokens = [1000 + i for i in range(profile.block_size)]
    extra = event_extra(profile.extra_keys, untagged, number, name, path)
    state = block_state(profile, root_state(profile), tokens, extra)
    return RootBlock(key_of(state), tokens, untagged, number, name, path, state if whole else None)


def profile(name: str) -> HashProfile:
    return HashProfile.parse(name)


@pytest.mark.parametrize("vector", CAPTURED, ids=lambda v: f"{v['capture']}-{v['cache_salt']}")
def test_profiles_of_real_engines_are_discovered(vector: dict[str, Any]) -> None:
    expected = profile(vector["profile"])
    untagged = vector["untagged"] and vector["untagged"][0]
    block = RootBlock(vector["keys"][0], vector["tokens"][: expected.block_size], untagged, None, None, None)
    hidden_salt = vector["cache_salt"] is not None and vector["untagged"] is None
    assert discover(block) == (None if hidden_salt else expected)
    assert reproduces(expected, block) is not hidden_salt


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Algorithm),
    st.sampled_from(["0", "42", "1023", FIXED_SEED, "given"]),
    st.integers(1, 128),
    st.sampled_from(ExtraKeys),
    st.booleans(),
)
def test_algorithm_seed_block_size_and_encoding_are_found_from_a_root_with_extras(
    algorithm: Algorithm, seed: str, block_size: int, encoding: ExtraKeys, whole: bool
) -> None:
    truth = HashProfile(algorithm, seed, block_size, encoding)
    block = root(truth, ["sql", ["img", 3], "tenant"], (2, "sql", "/sql"), whole and algorithm != "sha256_cbor_64bit")
    assert discover(block, seeds=["given"]) == truth
    assert reproduces(truth, block)


@pytest.mark.parametrize(
    ("truth", "found"),
    [
        ("sha256_cbor_64bit/b16/tagged/seed=1", "sha256_cbor_64bit/b16/lora-id/seed=1"),
        ("sha256/b16/lora-id/seed=vllm-none-hash", "sha256/b16/tagged/seed=vllm-none-hash"),
        ("sha256_cbor/b16/lora-name/seed=1", "sha256_cbor/b16/tagged/seed=1"),
    ],
)
def test_without_extras_the_likeliest_encoding_is_taken_and_refined_later(truth: str, found: str) -> None:
    taken = discover(root(profile(truth)))
    assert taken == profile(found)
    with_extras = root(profile(truth), ["sql"], (2, "sql", "/sql"))
    assert not reproduces(taken, with_extras)
    assert refine(taken, with_extras) == profile(truth)


def test_refining_keeps_what_fits_and_gives_up_on_another_seed() -> None:
    mine = profile("sha256/b16/lora-id/seed=1")
    assert refine(mine, root(mine, [["img", 3]])) == mine  # by name would fit as well
    assert refine(profile("sha256/b16/lora-id/seed=2"), root(mine, ["tenant"])) is None


def test_a_candidate_goes_first_and_keeps_its_encoding_but_not_its_block_size() -> None:
    truth = profile("sha256_cbor/b16/lora-name/seed=far out")
    assert discover(root(truth)) is None
    assert discover(root(truth), candidates=[profile("sha256/b16/tagged/seed=1"), truth]) == truth
    assert discover(root(truth), candidates=[profile("sha256_cbor/b64/lora-name/seed=far out")]) == truth


def test_the_seed_of_a_candidate_is_tried_with_other_algorithms() -> None:
    truth = profile("xxhash/b16/tagged/seed=far out")
    assert discover(root(truth), candidates=[profile("sha256/b16/tagged/seed=far out")]) == truth


def test_a_whole_hash_must_fit_as_a_whole() -> None:
    truth = profile("sha256/b16/tagged/seed=1")
    real = root(truth, whole=True)
    assert real.full is not None
    false = RootBlock(real.key, real.tokens, None, None, None, None, b"\0" + real.full[1:])
    assert discover(real) == truth
    assert discover(false) is None
    assert not reproduces(truth, false)


def test_an_adapter_of_unknown_path_leaves_the_encodings_that_do_not_hash_it() -> None:
    block = RootBlock(7, TOKENS, ["sql"], 2, "sql", None)
    assert not reproduces(profile("sha256/b16/tagged/seed=1"), block)
    by_name = root(profile("sha256/b16/lora-name/seed=1"), ["sql"], (2, "sql", "/sql"))
    unknown_path = RootBlock(by_name.key, by_name.tokens, ["sql"], 2, "sql", None)
    assert discover(unknown_path) == profile("sha256/b16/lora-name/seed=1")


def test_what_is_no_root_block_is_not_reproduced() -> None:
    assert discover(RootBlock(7, [], None, None, None, None)) is None
    assert discover(RootBlock(7, TOKENS, [{"?": 1}], None, None, None)) is None
    assert not reproduces(profile("sha256/b32/tagged/seed=1"), root(profile("sha256/b16/tagged/seed=1")))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_block_that_is_no_root_is_checked_from_its_parents_state(algorithm: Algorithm) -> None:
    mine = HashProfile(algorithm, "1", 16, TAGGED)
    parent = block_state(mine, root_state(mine), TOKENS, (("cache_salt", "x"),))
    key = key_of(block_state(mine, parent, TOKENS, None))
    assert follows(mine, parent, key, TOKENS, None)
    assert not follows(mine, parent, key, [*TOKENS[:-1], 5], None)
    assert not follows(mine, root_state(mine), key, TOKENS, None)
