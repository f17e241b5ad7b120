"""Where a text may be cut so that its pieces, tokenised one by one, give the tokens of the whole.

A tokenizer first cuts the raw text at its added tokens (leftmost, then longest), and treats what lies between them
piece by piece: normalisation, words, merges. So the tokens up to the end of an added token never depend on what
follows. That holds if the token is matched in the raw text (not `normalized`), swallows no neighbouring whitespace
(`lstrip`, `rstrip`) and needs no word boundary (`single_word`), and if no step treats the first piece of a text
differently. Where one of these is not so, nothing is cut. Cuts are made at tokens marked `special` only: there are few
of them, and they delimit turns. Source: tokenizers 0.23 tokenizer/added_vocabulary.rs and pre_tokenizers/.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

_NORMALIZERS = frozenset(
    [
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Lowercase",
        "Strip",
        "StripAccents",
        "Replace",
        "Prepend",
        "ByteLevel",
        "BertNormalizer",
        "Precompiled",
    ]
)
_PRE_TOKENIZERS = frozenset(
    [
        "Split",
        "Digits",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
        "CharDelimiterSplit",
        "UnicodeScripts",
        "BertPreTokenizer",
    ]
)


class SpecialTokens:
    """Finds the special tokens of a tokenizer in texts."""

    def __init__(self, added: Iterable[AddedToken]) -> None:
        raw = [token for token in added if not token.normalized and token.content]
        self.exact = not any(token.lstrip or token.rstrip or token.single_word for token in raw)
        self._cuts = frozenset(token.content for token in raw if token.special)
        self._tokens = frozenset(token.content for token in raw)
        self._pattern = re.compile(_longest(self._tokens)) if self._tokens else None

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every special token, in characters, in order."""
        if self._pattern is None:
            return
        for found in self._pattern.finditer(text):
            if found.group() in self._cuts:
                yield found.span()

    def pieces(self, text: str) -> list[str]:
        """The text, cut after every special token; the whole if it cannot be cut exactly. No piece is empty."""
        if not self.exact:
            return [text] if text else []
        pieces, done = [], 0
        for _, end in self.places(text):
            pieces.append(text[done:end])
            done = end
        if done < len(text):
            pieces.append(text[done:])
        return pieces

    def stable_length(self, text: str, known: int) -> int:
        """How many of the first `known` characters have tokens that no other ending of the text could change."""
        if not self.exact:
            return 0
        edges = [edge for place in self.places(text) for edge in place if edge <= known]
        return max(edges, default=0)


def _longest(texts: Collection[str]) -> str:
    """A pattern for the longest of some texts, in which what they begin with alike stands once: texts full of `<` cost
    no more than others then, whatever number of tokens begins so.
    """
    first, last = min(texts), max(texts)  # what these share, all share
    begun = first[
        : next((at for at, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
    ]
    by_first: dict[str, set[str]] = {}
    for rest in sorted(text[len(begun) :] for text in texts):
        by_first.setdefault(rest[:1], set()).add(rest)
    ends_here = by_first.pop("", None) is not None
    if not by_first:
        return re.escape(begun)
    return f"{re.escape(begun)}(?:{'|'.join(map(_longest, by_first.values()))}){'?' if ends_here else ''}"


def treats_pieces_alike(definition: Mapping[str, Any]) -> bool:
    """Whether every step of a `tokenizer.json` is known to treat a piece the same wherever in the text it stands."""
    normalizers = _steps(definition.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(definition.get("pre_tokenizer"), "pretokenizers")
    return all(step.get("type") in _NORMALIZERS for step in normalizers) and all(map(_alike, pre_tokenizers))


def _alike(step: Mapping[str, Any]) -> bool:
    match step.get("type"):
        case "ByteLevel":
            return step.get("add_prefix_space") is False
        case "Metaspace":
            return step.get("prepend_scheme") in ("never", "always")
        case kind:
            return kind in _PRE_TOKENIZERS


def _steps(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return
    if step.get("type") == "Sequence":
        for part in step.get(inner, ()):
            yield from _steps(part, inner)
    else:
        yield step
