import hashlib
import json
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.extras import Extra, Lora, PromptExtras, event_extra, prompt_extra
from kvatlas_common.blocks.keys import (
    PLAIN_TOKENS_MAX,
    TokenIds,
    block_state,
    extend,
    key_of,
    prompt_keys,
    published_state,
    root_state,
)
from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, ExtraKeys, HashProfile

DATA = Path(__file__).parents[3] / "data" / "blocks"
CAPTURED: list[dict[str, Any]] = json.loads((DATA / "captures.json").read_text())
VLLM: list[dict[str, Any]] = json.loads((DATA / "vllm-0.32.json").read_text())

EDGES = [0, 23, 24, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
tokens_of_every_width = st.one_of(
    st.sampled_from(EDGES),
    *(st.integers(0, top) for top in (23, 255, 65535, 150_000, 2**31 - 1, 2**32 - 1)),
    st.integers(0, 2**64 - 1) | st.integers(-5, -1),
)
usual_tokens = st.integers(0, 150_000)
names = st.text(st.characters(codec="utf-8"), max_size=20)
prompt_extras = st.builds(
    PromptExtras, st.none() | st.builds(Lora, names.filter(bool), st.integers(1, 2**33), names), st.none() | names
)


def plainly(profile: HashProfile, parent: bytes, tokens: TokenIds, extras: PromptExtras, first: bool) -> list[bytes]:
    """Block by block, by the definition alone."""
    size, states = profile.block_size, []
    for start in range(0, len(tokens) - size + 1, size):
        extra = prompt_extra(profile.extra_keys, extras, first and start == 0)
        parent = block_state(profile, parent, tokens[start : start + size], extra)
        states.append(parent)
    return states


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A block size and tokens for it, with a rest of a block at the end."""
    size = draw(st.sampled_from([1, 2, 3, 4, 16, 23, 24, 64, 255, 256, 300]) | st.integers(1, 300))
    seed = draw(st.lists(draw(st.sampled_from([tokens_of_every_width, usual_tokens])), min_size=1, max_size=40))
    most = 4 * size + 1
    length = draw(st.integers(0, most) | st.integers(PLAIN_TOKENS_MAX, PLAIN_TOKENS_MAX + most))
    return size, (seed * (length // len(seed) + 1))[:length]


@settings(max_examples=200, deadline=None)
@given(
    prompt=prompts(),
    hashed=st.tuples(st.sampled_from(Algorithm), st.sampled_from(ExtraKeys)),
    extras=prompt_extras,
    first=st.booleans(),
    zeros=st.integers(0, 8),
)
def test_all_at_once_equals_block_by_block(
    prompt: tuple[int, list[int]], hashed: tuple[Algorithm, ExtraKeys], extras: PromptExtras, first: bool, zeros: int
) -> None:
    size, tokens = prompt
    profile = HashProfile(hashed[0], "42", size, hashed[1])
    root = root_state(profile)
    parent = bytes(zeros) + root[zeros:]  # a 64-bit parent with leading zeros is a shorter integer
    states = plainly(profile, parent, tokens, extras, first)
    keys, last = extend(profile, parent, tokens, extras, first)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [key_of(state) for state in states]
    assert last == ([parent, *states])[-1]


@pytest.mark.parametrize("token", [-1, *EDGES])
@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("times", [1, PLAIN_TOKENS_MAX], ids=["few", "many"])
def test_tokens_at_the_edge_of_a_width(algorithm: Algorithm, token: int, times: int) -> None:
    profile = HashProfile(algorithm, "42", 2, ExtraKeys.TAGGED)
    root, tokens = root_state(profile), [token, 1, 1, token] * times
    states = plainly(profile, root, tokens, PromptExtras(), True)
    assert extend(profile, root, tokens, PromptExtras(), True)[0].tolist() == [key_of(state) for state in states]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("algorithm", Algorithm)
def test_an_array_of_tokens_is_as_good_as_a_list(algorithm: Algorithm, dtype: type[np.integer[Any]]) -> None:
    profile = HashProfile(algorithm, "42", 16, ExtraKeys.TAGGED)
    tokens = list(range(0, 160_000, 1000))
    if dtype is np.uint64:
        tokens[20] = 2**64 - 1
    array = np.array(tokens, dtype=dtype)
    assert prompt_keys(profile, array).tolist() == prompt_keys(profile, tokens).tolist()
    root = root_state(profile)
    assert block_state(profile, root, array[:16], None) == block_state(profile, root, tokens[:16], None)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_block_beyond_one_pickle_frame(algorithm: Algorithm) -> None:
    profile = HashProfile(algorithm, "42", 20_000, ExtraKeys.TAGGED)
    tokens = [70_000 + i for i in range(40_001)]
    root = root_state(profile)
    expected = plainly(profile, root, tokens, PromptExtras(), True)
    assert prompt_keys(profile, tokens).tolist() == [key_of(state) for state in expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(usual_tokens, max_size=60), st.integers(0, 60), st.sampled_from(Algorithm), prompt_extras)
def test_a_prefix_hashed_before_can_be_continued(
    tokens: list[int], cut: int, algorithm: Algorithm, extras: PromptExtras
) -> None:
    profile = HashProfile(algorithm, "0", 4, ExtraKeys.TAGGED)
    cut = min(cut, len(tokens)) // 4 * 4
    whole, last = extend(profile, root_state(profile), tokens, extras, first=True)
    head, middle = extend(profile, root_state(profile), tokens[:cut], extras, first=True)
    tail, end = extend(profile, middle, tokens[cut:], extras, first=cut == 0)
    assert [*head.tolist(), *tail.tolist()] == whole.tolist()
    assert end == last


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_the_last_token_is_always_computed(tokens: int, blocks: int) -> None:
    profile = HashProfile(Algorithm.SHA256_CBOR, "42", 16, ExtraKeys.TAGGED)
    assert len(prompt_keys(profile, range(tokens))) == blocks


def test_the_definition_written_out() -> None:
    """sha256_cbor and sha256_cbor_64bit differ in what the next block is chained to, and so from the first block on."""
    tokens = list(range(4))
    seed = hashlib.sha256(b"\x6242").digest()
    full = hashlib.sha256(cbor2.dumps([seed, tokens, None])).digest()
    short = hashlib.sha256(cbor2.dumps([int.from_bytes(seed[-8:], "big"), tokens, None])).digest()
    for algorithm, state in (("sha256_cbor", full), ("sha256_cbor_64bit", short[-8:])):
        profile = HashProfile(Algorithm(algorithm), "42", 4, ExtraKeys.TAGGED)
        assert block_state(profile, root_state(profile), tokens, None) == state


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_hash_depends_on_values_not_on_objects(algorithm: Algorithm) -> None:
    """Pickle refers back to an object it has seen: equal extras must hash equally whoever built them."""
    profile = HashProfile(algorithm, "42", 2, ExtraKeys.TAGGED)
    word = "tenant-a"

    def copy(text: str) -> str:
        return text.encode().decode()

    shared: Extra = (("lora", word, word), ("mm", word, 1), ("mm", word, 2), ("cache_salt", word))
    apart: Extra = tuple(tuple(copy(x) if isinstance(x, str) else x for x in item) for item in shared)
    parent = root_state(profile)
    assert block_state(profile, parent, [1, 2], shared) == block_state(profile, parent, [1, 2], apart)


def test_the_state_behind_a_published_hash() -> None:
    narrow = HashProfile(Algorithm.SHA256_CBOR_64BIT, "42", 16, ExtraKeys.LORA_ID)
    wide = HashProfile(Algorithm.SHA256, "42", 16, ExtraKeys.TAGGED)
    assert published_state(narrow, 5) == b"\0\0\0\0\0\0\0\5"
    assert published_state(narrow, 1 << 64) is None
    assert published_state(wide, 5) is None
    assert published_state(wide, b"\1" * 32) == b"\1" * 32
    assert published_state(wide, b"\1" * 16) is None


def event_extras(vector: dict[str, Any], encoding: ExtraKeys) -> list[Extra | None]:
    name, number, path = vector.get("lora") or (None, None, None)
    return [event_extra(encoding, untagged, number, name, path) for untagged in vector["untagged"]]


def chained(profile: HashProfile, tokens: list[int], extras: list[Extra | None]) -> list[bytes]:
    states, size = [root_state(profile)], profile.block_size
    for i, extra in enumerate(extras):
        states.append(block_state(profile, states[-1], tokens[i * size : (i + 1) * size], extra))
    return states[1:]


@pytest.mark.parametrize("vector", CAPTURED, ids=lambda v: f"{v['capture']}-{v['cache_salt']}")
def test_keys_that_real_engines_published(vector: dict[str, Any]) -> None:
    profile = HashProfile.parse(vector["profile"])
    extras = PromptExtras(cache_salt=vector["cache_salt"])
    keys, _ = extend(profile, root_state(profile), vector["tokens"], extras, first=True)
    assert keys.tolist() == vector["keys"]
    if vector["untagged"] is not None:
        states = chained(profile, vector["tokens"], event_extras(vector, profile.extra_keys))
        assert [key_of(state) for state in states] == vector["keys"]


@pytest.mark.parametrize("vector", VLLM, ids=lambda v: f"{v['profile'].partition('/')[0]}-{v['case']}")
def test_hashes_computed_by_vllm(vector: dict[str, Any]) -> None:
    profile = HashProfile.parse(vector["profile"])
    states = chained(profile, vector["tokens"], event_extras(vector, profile.extra_keys))
    assert [state.hex() for state in states] == vector["hashes"]
    if not vector["multimodal"]:
        lora = Lora(*vector["lora"]) if vector["lora"] else None
        extras = PromptExtras(lora, vector["cache_salt"])
        keys, last = extend(profile, root_state(profile), vector["tokens"], extras, first=True)
        assert keys.tolist() == [key_of(state) for state in states]
        assert last == states[-1]


def test_the_data_covers_what_it_claims() -> None:
    assert {v["profile"].partition("/")[0] for v in VLLM} == set(Algorithm) - {"sha256_cbor_64bit"}
    assert {v["profile"].partition("/")[0] for v in CAPTURED} == {"sha256_cbor_64bit", "sha256_cbor", "sha256"}
    assert any(v["profile"].endswith(FIXED_SEED) for v in CAPTURED)
