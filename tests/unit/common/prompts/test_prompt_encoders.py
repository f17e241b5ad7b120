"""A fast encoder stands in for the reference only where it gives the same ids, and no longer than it does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.prompts import PromptError
from kvatlas_common.prompts.encoders import CheckedEncoder, Difference, LibraryEncoder, difference
from kvatlas_common.prompts.fast_encoder import _SPLITS, FastEncoder, fastest
from kvatlas_common.prompts.hostile_texts import hostile_texts
from kvatlas_common.prompts.requests import TokenIds

TINY = Path(__file__).parents[3] / "data" / "models" / "tiny" / "tokenizer.json"
DEFINITION: dict[str, Any] = json.loads(TINY.read_text())
WORDS = DEFINITION["pre_tokenizer"]["pretokenizers"][0]
BYTES = DEFINITION["pre_tokenizer"]["pretokenizers"][1]


def split(*patterns: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTES]}


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": 8000, "content": content, **plain, **flags}


def made(**parts: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    definition = {**DEFINITION, **parts}
    return tokenizers.Tokenizer.from_str(json.dumps(definition)), definition


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
COMPARED = [split(*patterns) for patterns in sorted(_SPLITS)] + [GPT2]
ODD = [text for text in hostile_texts(["<|im_start|>", "<|im_end|>"]) if text]
PIECES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(ODD).flatmap(lambda t: st.tuples(st.just(t), st.integers(0, len(t)))).map(lambda p: p[0][: p[1]]),
    st.tuples(st.sampled_from(" \n\t\r\u00a0\u3000aZ1'-\u4e2d\u0301"), st.integers(1, 200)).map(lambda p: p[0] * p[1]),
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<|im_", "'s", "'\u017f", "e\u0301", "\u1100\u1161", "\U0001f44d\U0001f3fd"]
    ),
)


@functools.cache
def pairs() -> list[tuple[LibraryEncoder, FastEncoder]]:
    """A second of work, in the one process that compares them."""
    normalizers = (None, {"type": "NFC"})
    compared = [made(pre_tokenizer=steps, normalizer=norm)[0] for steps in COMPARED for norm in normalizers]
    return [(LibraryEncoder(tokenizer), FastEncoder(tokenizer.to_str())) for tokenizer in compared]


@given(pieces=st.lists(PIECES, max_size=8), kept=st.integers(0, 8))
@settings(max_examples=80, deadline=None)
def test_the_same_ids_as_the_reference(pieces: list[str], kept: int) -> None:
    whole, begun = "".join(pieces), "".join(pieces[:kept])
    for exact, fast in pairs():
        for text in (whole, begun, begun + "x", whole):  # what is remembered of one text must not show in the next
            assert difference(text, exact.encode(text), fast.encode(text)) is None


@pytest.mark.parametrize("steps", COMPARED, ids=repr)
def test_tokenizers_of_known_steps_are_encoded_fast(steps: dict[str, Any]) -> None:
    assert isinstance(fastest(*made(pre_tokenizer=steps)), CheckedEncoder)


NOT_COMPARED: dict[str, dict[str, Any]] = {
    "another pattern": {"pre_tokenizer": split(WORDS["pattern"]["Regex"] + "|x")},
    "another order of patterns": {"pre_tokenizer": split(r"\p{N}{1,3}")},
    "kept otherwise": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**WORDS, "behavior": "MergedWithNext"}, BYTES]}
    },
    "prefix space": {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
    "no bytes": {"pre_tokenizer": WORDS},
    "no words": {"pre_tokenizer": None},
    "another normalisation": {"normalizer": {"type": "NFKC"}},
    "lower case": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
    "dropout": {"model": {**DEFINITION["model"], "dropout": 0.1}},
    "tokens that swallow spaces": {"added_tokens": [*DEFINITION["added_tokens"], token("<s>", rstrip=True)]},
    "tokens found after normalisation": {"added_tokens": [*DEFINITION["added_tokens"], token("<s>", normalized=True)]},
}


@pytest.mark.parametrize("kind", NOT_COMPARED)
def test_all_others_are_left_to_the_reference(kind: str) -> None:
    assert isinstance(fastest(*made(**NOT_COMPARED[kind])), LibraryEncoder)


def test_special_tokens_as_ordinary_text_are_left_to_the_reference() -> None:
    tokenizer, definition = made()
    tokenizer.encode_special_tokens = True
    assert isinstance(fastest(tokenizer, definition), LibraryEncoder)


def test_one_difference_on_the_hostile_texts_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: FastEncoder, text: str) -> TokenIds:
        ids = right(self, text)
        return ids[:-1] if text.endswith("\u4e2d") else ids

    right = FastEncoder.encode
    monkeypatch.setattr(FastEncoder, "encode", wrong)
    assert isinstance(fastest(*made()), LibraryEncoder)


def test_both_refuse_what_is_no_unicode() -> None:
    for encoder in pairs()[0]:
        with pytest.raises(PromptError, match="Unicode"):
            encoder.encode("a\ud800b")


class Says:
    """An encoder that gives one token per character, but for `wrong` at its place."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.asked = 0

    def encode(self, text: str) -> TokenIds:
        self.asked += 1
        return np.array([0 if char == self.wrong else ord(char) for char in text], np.uint32)


def taken(encoder: CheckedEncoder, text: str) -> bool:
    """Whether the text is one of those that are compared."""
    while encoder.due:
        encoder.check()
    encoder.encode(text)
    return encoder.due


def test_a_difference_ends_the_use_of_the_fast_one() -> None:
    fast, exact = Says(wrong="?"), Says()
    encoder = CheckedEncoder(fast, exact)
    assert encoder.encode("right").tolist() == list(map(ord, "right"))
    assert encoder.check() is None
    assert encoder.encode("or?").tolist() == [*map(ord, "or"), 0]  # nobody knows yet
    assert encoder.check() == Difference(chars=3, at_token=2)
    asked = fast.asked
    assert encoder.encode("or?").tolist() == list(map(ord, "or?"))
    assert (fast.asked, encoder.difference) == (asked, Difference(3, 2))


def test_which_texts_are_compared() -> None:
    encoder = CheckedEncoder(Says(), Says(), every=8)
    first = [taken(encoder, "a") for _ in range(16)]
    assert all(first)
    assert [taken(encoder, "a") for _ in range(16)].count(True) == 2
    assert [taken(encoder, "\u00e9") for _ in range(16)].count(True) == 8  # beyond ASCII four times as many


def test_what_waits_to_be_compared_is_bounded() -> None:
    exact = Says()
    encoder = CheckedEncoder(Says(), exact)
    for number in range(16):
        encoder.encode(str(number))
    encoder.check()
    assert (exact.asked, encoder.due) == (4, False)


@pytest.mark.parametrize(("right", "other", "at"), [([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [5], 0)])
def test_where_they_part(right: list[int], other: list[int], at: int) -> None:
    assert difference("abc", np.array(right, np.uint32), np.array(other, np.uint32)) == Difference(3, at)
