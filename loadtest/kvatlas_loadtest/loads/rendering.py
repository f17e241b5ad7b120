"""Arrivals as bodies of the OpenAI API: a segment becomes words, an answer the text that was answered.

What shares tokens shares text: as a completion the whole prompt is one text, as a chat each row of segments is one
message of the user's and each answer one of the assistant's, so that two prompts with the same leading parts begin
alike whatever follows. A segment of n tokens is n words, about n tokens in common vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

from kvatlas_common.prompts.requests import CHAT, COMPLETIONS
from kvatlas_loadtest.loads.arrivals import Arrival, Part, Segment
from kvatlas_loadtest.texts import text

TEXTS_KEPT = 512  # contexts that come again; a text of 6,000 words is about 36 KB

_text = lru_cache(TEXTS_KEPT)(text)


@dataclass(frozen=True, slots=True)
class Rendering:
    """`chat`: as /v1/chat/completions. `extra`: fields that go into every body, such as `ignore_eos`."""

    model: str
    chat: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return CHAT if self.chat else COMPLETIONS

    def body(self, arrival: Arrival, answers: Mapping[int, str]) -> dict[str, Any]:
        """`answers`: text by the index of the arrival it answers. Raises `KeyError` where one is missing."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": arrival.output_tokens, **self.extra}
        if self.chat:
            body["messages"] = self._messages(arrival, answers)
        else:
            body["prompt"] = " ".join(_rendered(part, answers) for part in arrival.prompt)
        if arrival.salt is not None:
            body["cache_salt"] = arrival.salt
        return body

    def _messages(self, arrival: Arrival, answers: Mapping[int, str]) -> list[dict[str, str]]:
        rows = groupby(arrival.prompt, key=lambda part: isinstance(part, Segment))
        return [
            {
                "role": "user" if asked else "assistant",
                "content": " ".join(_rendered(part, answers) for part in parts),
            }
            for asked, parts in rows
        ]


def _rendered(part: Part, answers: Mapping[int, str]) -> str:
    return _text(part.seed, part.tokens) if isinstance(part, Segment) else answers[part.of]
