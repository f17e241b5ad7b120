"""Texts cut at special tokens give the tokens of the whole, for tokenizers of every kind in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.prompts import BadModelFiles, ModelFiles, PromptError
from kvatlas_common.prompts.special_tokens import SpecialTokens, treats_pieces_alike
from kvatlas_common.prompts.tokenizers import TextTokenizer

TINY = Path(__file__).parents[3] / "data" / "models" / "tiny"
DEFINITION: dict[str, Any] = json.loads((TINY / "tokenizer.json").read_text())
VOCABULARY = len(DEFINITION["model"]["vocab"])


def token(index: int, content: str, **flags: bool) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": VOCABULARY + index, "content": content, **defaults, **flags}


def changed(**parts: Any) -> dict[str, Any]:
    return {**DEFINITION, **parts, "added_tokens": DEFINITION["added_tokens"] + parts.get("added_tokens", [])}


SPLIT = DEFINITION["pre_tokenizer"]["pretokenizers"][0]
KINDS: dict[str, dict[str, Any]] = {
    "tiny": DEFINITION,
    "overlapping": changed(added_tokens=[token(0, "<|im"), token(1, "_start|><"), token(2, "\n\n"), token(3, "\n")]),
    "not special": changed(added_tokens=[token(0, "<think>", special=False), token(1, "<|im_end|>\n", special=False)]),
    "normalized": changed(added_tokens=[token(0, "heap", normalized=True), token(1, "é", normalized=True)]),
    "swallowing": changed(added_tokens=[token(0, "<|end|>", rstrip=True), token(1, "<m>", lstrip=True)]),
    "prefix space": changed(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "first piece": changed(
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    ),
    "every piece": changed(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}]},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, SPLIT],
        },
    ),
}
EXACT = sorted({"tiny", "overlapping", "not special", "normalized", "every piece"})
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "<|im",
    "_start|>",
    "<think>",
    "<|end|>",
    "<m>",
    "\n",
    "\n\n",
    " ",
    "  ",
]
WORDS = st.sampled_from([*MARKS, "'S", "heap", "é", "e\u0301", "東京", "item", "(x, y)", "1234"])
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=25).map("".join)


def build(definition: dict[str, Any]) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    special = SpecialTokens(tokenizer.get_added_tokens_decoder().values())
    special.exact &= treats_pieces_alike(definition)
    return tokenizer, special


BUILT = {kind: build(definition) for kind, definition in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokenizers_may_be_cut(kind: str) -> None:
    assert BUILT[kind][1].exact is (kind in EXACT)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=80, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(kind: str, text: str) -> None:
    tokenizer, special = BUILT[kind]
    pieces = special.pieces(text)
    assert "".join(pieces) == text
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids] == whole


@pytest.mark.parametrize("kind", EXACT)
@given(text=TEXTS, other=TEXTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_stable_text_keeps_its_tokens_whatever_follows(kind: str, text: str, other: str, data: st.DataObject) -> None:
    tokenizer, special = BUILT[kind]
    known = data.draw(st.integers(0, len(text)))
    stable = special.stable_length(text, known)
    assert 0 <= stable <= known
    ids = tokenizer.encode(text[:stable], add_special_tokens=False).ids
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert whole[: len(ids)] == ids


@given(text=TEXTS)
@settings(deadline=None)
def test_special_tokens_are_found_where_the_tokenizer_finds_them(text: str) -> None:
    tokenizer, special = BUILT["overlapping"]
    found = [text[start:end] for start, end in special.places(text)]
    contents = {t["content"]: t["id"] for t in KINDS["overlapping"]["added_tokens"]}
    ids = set(contents.values())
    assert [contents[f] for f in found] == [i for i in tokenizer.encode(text).ids if i in ids]


def test_what_surrounds_a_text(model_folder: Any) -> None:
    llama = TextTokenizer.load(ModelFiles(model_folder("llama_like")))
    assert (llama.front.tolist(), llama.back.tolist()) == ([8000], [])
    assert llama.names == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tiny = TextTokenizer.load(ModelFiles(TINY))
    assert (tiny.front.tolist(), tiny.back.tolist()) == ([], [])


def test_tokens_the_config_adds(model_folder: Any) -> None:
    llama = TextTokenizer.load(ModelFiles(model_folder("llama_like")))
    assert llama.encoder.encode("<|late|>").tolist() == [8005]  # tokenizer.json does not know it


def load(folder: Path, definition: Any, **config: Any) -> TextTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.load(ModelFiles(folder))


def test_the_configs_flags_win(tmp_path: Path) -> None:
    given = {
        "content": "<m>",
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    definition = changed(added_tokens=[token(0, "<m>")])
    assert load(tmp_path, definition).special.exact
    assert not load(tmp_path, definition, added_tokens_decoder={str(VOCABULARY): given}).special.exact


def test_named_tokens_become_special(tmp_path: Path) -> None:
    names = {
        "bos_token": {"content": "<s>"},
        "image_token": "<image>",
        "extra_special_tokens": {"video_token": "<video>"},
    }
    tokenizer = load(tmp_path, DEFINITION, **names)
    assert tokenizer.names == {"bos_token": "<s>", "image_token": "<image>", "video_token": "<video>"}
    assert tokenizer.special.pieces("a<image>b") == ["a<image>", "b"]


def test_special_tokens_may_be_ordinary_text(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, DEFINITION, split_special_tokens=True)
    assert 2 not in tokenizer.encoder.encode("a<|im_end|>b")
    assert tokenizer.special.pieces("a<|im_end|>b") == ["a<|im_end|>b"]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    definition = changed(truncation=truncation, padding=padding | {"pad_token": "<|endoftext|>"})
    assert load(tmp_path, definition).encoder.encode("a b c d").tolist() == [67, 302, 285, 332]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFiles, match=r"tokenizer\.json"):
        load(tmp_path, {"model": {"type": "BPE"}})
    with pytest.raises(BadModelFiles, match=r"tokenizer\.json"):
        load(tmp_path, [])


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="Unicode"):
        TextTokenizer.load(ModelFiles(TINY)).encoder.encode("a\ud800b")


def test_ids_are_uint32() -> None:
    assert TextTokenizer.load(ModelFiles(TINY)).encoder.encode("hello").dtype == np.uint32
