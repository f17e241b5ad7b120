"""Text to the ids of the text alone: by `tokenizers`, or by something faster that is held to it.

One wrong id is another block key, and so a cached prefix that is silently not found. `tokenizers` is what engines use:
what it says is right. Another encoder is asked in its place only as long as texts taken from the traffic go on giving
the same ids; the first one that does not ends it, for good.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import tokenizers

from kvatlas_common.prompts.errors import PromptError
from kvatlas_common.prompts.requests import TokenIds

SAMPLE_EVERY = 64
"""One text in so many is compared; of those that are not all ASCII, where libraries differ, four times as many."""

_SAMPLES_KEPT = 4
_SAMPLE_CHARS_MAX = 1 << 20
_FIRST_SAMPLES = 16  # of a new encoder every text, so that what is wrong at once shows at once


class Encoder(Protocol):
    """The ids of a text alone: nothing in front, nothing behind, never truncated."""

    def encode(self, text: str) -> TokenIds:
        """uint32[n]. Raises `PromptError` for text that is no Unicode."""


class LibraryEncoder:
    """`tokenizers.Tokenizer`, without the parts of an encoding that are not ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> TokenIds:
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeError) as error:  # lone surrogates, which JSON can carry
            raise PromptError("the text is not valid Unicode") from error
        return np.array(encoding.ids, np.uint32)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two encoders part: in a text of so many characters, from its n-th token on. Never the text itself."""

    chars: int
    at_token: int


class CheckedEncoder:
    """`fast`, as long as it gives the ids of `exact`.

    Some of the texts encoded are kept to be compared, which `check` does, in any thread; `due` says that there are any.
    Bounded: when nobody checks, the oldest are dropped.
    """

    def __init__(self, fast: Encoder, exact: Encoder, every: int = SAMPLE_EVERY) -> None:
        self._fast = fast
        self._exact = exact
        self._every = every
        self._weight = 0
        self._first = _FIRST_SAMPLES
        self._samples: deque[tuple[str, TokenIds]] = deque(maxlen=_SAMPLES_KEPT)
        self.difference: Difference | None = None
        """The one that ended it."""

    def encode(self, text: str) -> TokenIds:
        if self.difference is not None:
            return self._exact.encode(text)
        ids = self._fast.encode(text)
        self._weight += 1 if text.isascii() else 4
        if (self._weight >= self._every or self._first > 0) and len(text) <= _SAMPLE_CHARS_MAX:
            self._weight, self._first = 0, self._first - 1
            self._samples.append((text, ids))
        return ids

    @property
    def due(self) -> bool:
        return bool(self._samples)

    def check(self) -> Difference | None:
        """Compares what has been kept; the first difference ends the use of `fast`."""
        while self._samples and self.difference is None:
            text, ids = self._samples.popleft()
            self.difference = difference(text, self._exact.encode(text), ids)
        return self.difference


def difference(text: str, right: TokenIds, other: TokenIds) -> Difference | None:
    """None for the same ids."""
    if np.array_equal(right, other):
        return None
    shared = min(len(right), len(other))
    unequal = np.flatnonzero(right[:shared] != other[:shared])
    return Difference(len(text), int(unequal[0]) if unequal.size else shared)
