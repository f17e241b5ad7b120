"""`fastokens` in the place of `tokenizers` wherever it is proven to give the same ids: 40 times faster on 5 KB of text.

Its earlier versions had silent defects (ids that depended on the text before, newer Unicode tables than `tokenizers`,
cuts of long texts). So it is used
1. only in versions that were compared here (`pyproject.toml` bounds them);
2. only for tokenizers made of the steps that were compared: byte-level BPE, no normalisation but NFC, words split by
   one of the patterns below, which it has hand-written scanners for, and added tokens that take nothing beside them;
3. after it gave the ids of `tokenizers` for all of `hostile_texts` with this very vocabulary;
4. as long as texts taken from the traffic agree (`CheckedEncoder`).
Anything else is left to `tokenizers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers

from kvatlas_common.prompts.encoders import CheckedEncoder, Encoder, LibraryEncoder, difference
from kvatlas_common.prompts.errors import PromptError
from kvatlas_common.prompts.hostile_texts import hostile_texts
from kvatlas_common.prompts.requests import TokenIds

# Read by fastokens once. More threads would spin beside the event loop, and cut texts of 64 KB and more.
os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")

import fastokens

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SPLITS = frozenset(
    [
        (_WORDS + rf"|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _ENDS,),  # Llama 3, GLM, cl100k
        (_WORDS + rf"|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _ENDS,),  # Qwen 2, 2.5, 3
        (_WORDS + rf"|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*" + _ENDS,),  # Qwen 3.5
        (  # gpt-oss, Llama 4 (o200k)
            f"{_BEFORE}{_UPPER}*{_LOWER}+{_WORDS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_WORDS}?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS,
        ),
        (  # Mistral (tekken)
            f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS,
        ),
        (  # DeepSeek V3
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
    ]
)
"""The patterns, one after the other, that cut a text into words."""


class FastEncoder:
    """`fastokens.Tokenizer`. Small texts are encoded with the interpreter's lock held: they take microseconds."""

    def __init__(self, definition: str) -> None:
        """`definition`: a `tokenizer.json`. Raises `ValueError`."""
        self._tokenizer = fastokens.Tokenizer.from_json_str(definition)

    def encode(self, text: str) -> TokenIds:
        try:
            ids, _ = self._tokenizer.encode_batch_flat([text])
        except (TypeError, UnicodeError) as error:
            raise PromptError("the text is not valid Unicode") from error
        return np.frombuffer(ids, "<u4")


def fastest(tokenizer: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> Encoder:
    """The fastest encoder that is right for a tokenizer; `definition`: the `tokenizer.json` it was made from."""
    exact = LibraryEncoder(tokenizer)
    if not _compared(tokenizer, definition):
        return exact
    try:
        fast = FastEncoder(tokenizer.to_str())
    except ValueError:  # it knows what it cannot do
        return exact
    texts = hostile_texts([token.content for token in tokenizer.get_added_tokens_decoder().values()])
    agreed = all(difference(text, exact.encode(text), fast.encode(text)) is None for text in texts)
    return CheckedEncoder(fast, exact) if agreed else exact


def _compared(tokenizer: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> bool:
    """Whether it is made of the steps that were compared, and of nothing else."""
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        not tokenizer.encode_special_tokens
        and not any(t.lstrip or t.rstrip or t.single_word or t.normalized or not t.content for t in added)
        and _is_plain_bpe(definition.get("model"))
        and definition.get("normalizer") in (None, {"type": "NFC"})
        and _is_known_split(list(_steps(definition.get("pre_tokenizer"))))
    )


def _is_plain_bpe(model: Any) -> bool:
    fields = model if isinstance(model, Mapping) else {}
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return fields.get("type") == "BPE" and not any(fields.get(name) for name in unused)


def _is_known_split(steps: list[Mapping[str, Any]]) -> bool:
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space") is not False:
        return False
    patterns = []
    for step in steps[:-1]:
        if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
            return False
        pattern = step.get("pattern")
        patterns.append(pattern.get("Regex") if isinstance(pattern, Mapping) else None)
    if not patterns:
        return steps[-1].get("use_regex") is True  # GPT-2: its own
    return steps[-1].get("use_regex") is False and tuple(patterns) in _SPLITS


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return
    if step.get("type") == "Sequence":
        for inner in step.get("pretokenizers", ()):
            yield from _steps(inner)
    else:
        yield step
