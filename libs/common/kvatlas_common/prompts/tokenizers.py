"""Text to token ids, as the tokenizer an engine loads from the same files.

`tokenizers` does the work; here is only what transformers adds when it loads one: tokens that `tokenizer_config.json`
adds or changes, the names of the special tokens, and what stands around a text with `add_special_tokens`. Source:
transformers 5.19 tokenization_utils_tokenizers.py and tokenization_utils_base.py, vLLM 0.32 tokenizers/registry.py.

`fast_encoder` takes the place of `tokenizers` for the text itself wherever it is proven to give the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import tokenizers

from kvatlas_common.prompts.encoders import Encoder
from kvatlas_common.prompts.errors import BadModelFiles
from kvatlas_common.prompts.fast_encoder import fastest
from kvatlas_common.prompts.model_files import TOKENIZER, ModelFiles
from kvatlas_common.prompts.requests import TokenIds
from kvatlas_common.prompts.special_tokens import SpecialTokens, treats_pieces_alike

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TextTokenizer:
    """A model's tokenizer.

    `front`, `back`: the ids that `add_special_tokens` puts around a text. `names`: special tokens by name, as templates
    see them. `special`: where texts may be cut. `truncation_side`: where a prompt too long is cut unless it is said.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, definition: Mapping[str, Any], names: Mapping[str, str]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.encoder: Encoder = fastest(tokenizer, definition)
        self.front, self.back = _around(tokenizer)
        self.names = dict(names)
        self.special = SpecialTokens(tokenizer.get_added_tokens_decoder().values())
        self.special.exact &= treats_pieces_alike(definition) and not tokenizer.encode_special_tokens
        self.truncation_side: Literal["left", "right"] = "left"  # vLLM's choice for models that generate

    @classmethod
    def load(cls, files: ModelFiles) -> TextTokenizer:
        """Raises `BadModelFiles`."""
        definition, config = files.settings(TOKENIZER), files.settings("tokenizer_config.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer))
            names = _special_token_names(config, files)
            _add_tokens(tokenizer, config, names)
            tokenizer.encode_special_tokens = config.get("split_special_tokens") is True  # as ordinary text
        except Exception as error:  # `tokenizers` raises plain Exception
            raise BadModelFiles(f"{files.tokenizer}: {error}") from error
        return cls(tokenizer, definition, names)


def _special_token_names(config: Mapping[str, Any], files: ModelFiles) -> dict[str, str]:
    given = dict(config)
    if "added_tokens_decoder" not in config:
        given |= files.settings("special_tokens_map.json")
    extra = given.get("extra_special_tokens")
    if isinstance(extra, dict):
        given |= extra
    texts = {name: _text(value) for name, value in given.items() if name in _NAMED or name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """What the config says of added tokens wins over `tokenizer.json`; named tokens known to neither become special."""
    decoder = config.get("added_tokens_decoder")
    said = sorted(decoder.items(), key=lambda item: int(item[0])) if isinstance(decoder, dict) else []
    wanted = [_added(token) for _, token in said if isinstance(token, dict)]
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for token in wanted if repr(token) not in known]
    contents = {t.content for t in tokenizer.get_added_tokens_decoder().values()} | {t.content for t in new}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    texts = [*names.values(), *(_text(token) for token in (extra if isinstance(extra, list) else ()))]
    new += [tokenizers.AddedToken(t, special=True) for t in dict.fromkeys(texts) if t and t not in contents]
    if new:
        tokenizer.add_tokens(new)


def _added(token: Mapping[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS if flag in token})


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[TokenIds, TokenIds]:
    """What the post-processor puts before and after the ids of any text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    places = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    if not places:
        raise BadModelFiles("tokenizer.json: its post-processor changes the ids of the text itself")
    at = places[0]
    return np.array(full[:at], np.uint32), np.array(full[at + len(bare) :], np.uint32)
