"""The side of a tokenizer a simulated engine needs to answer: whole words, their text, and the token that ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from kvatlas_common.prompts.errors import BadModelFiles
from kvatlas_common.prompts.model_files import ModelFiles
from kvatlas_loadtest.answers import AnswerWords

IDS_LOOKED_AT = 20_000  # words made by early merges, the low ids, are the common ones
_FOLLOWING = re.compile(r" [a-z]{3,12}")
_OPENING = re.compile(r"[A-Z][a-z]{2,11}")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`text_of`: token id -> text, of every word in `words`. `eos`: the token that ends an answer, if there is one."""

    words: AnswerWords
    text_of: dict[int, str]
    eos: int | None

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Reads `tokenizer.json` and `config.json`. Raises `BadModelFiles`."""
        path = folder / "tokenizer.json"
        try:
            tokenizer: Tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise BadModelFiles(f"{path}: {error}") from error
        following, opening = _words(tokenizer, _FOLLOWING), _words(tokenizer, _OPENING)
        try:
            words = AnswerWords(tuple(opening), tuple(following))
        except ValueError as error:
            raise BadModelFiles(f"{path}: {error}") from None
        return cls(words, opening | following, _eos(ModelFiles(folder)))


def _words(tokenizer: Tokenizer, shape: re.Pattern[str]) -> dict[int, str]:
    """Tokens that are a word of this shape and what it is tokenised to; no fragments like ` exce` of ` except`."""
    texts = {i: tokenizer.decode([i]) for i in range(min(tokenizer.get_vocab_size(), IDS_LOOKED_AT))}
    shaped = sorted((text, i) for i, text in texts.items() if shape.fullmatch(text))
    whole = [(text, i) for (text, i), (longer, _) in pairwise([*shaped, ("", -1)]) if not longer.startswith(text)]
    return {i: text for text, i in whole if tokenizer.encode(text, add_special_tokens=False).ids == [i]}


def _eos(files: ModelFiles) -> int | None:
    eos = files.settings("config.json").get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    return eos if isinstance(eos, int) else None
