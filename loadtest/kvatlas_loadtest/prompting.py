"""From the body of a request to the token ids an engine computes: the one place that knows how to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from kvatlas_common.prompts.requests import COMPLETIONS, ChatPrompt, TextPrompt, Unrenderable, understand
from kvatlas_loadtest.openai_shapes import ApiError


class Prompter:
    """Tokenises for every engine that serves one model; several engines of a process may share it."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @classmethod
    def load(cls, folder: Path) -> Prompter:
        return cls(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            jinja2.Environment(autoescape=False).from_string((folder / "chat_template.jinja").read_text()),
        )

    def prompts(self, path: str, body: Mapping[str, Any]) -> list[Sequence[int]]:
        """Token ids of every prompt of the request, in order. Raises `ApiError` for one that has none."""
        several = body.get("prompt")
        if path == COMPLETIONS and isinstance(several, list) and several and isinstance(several[0], str | list):
            return [self._prompt(path, {**body, "prompt": prompt}) for prompt in several]
        return [self._prompt(path, body)]

    def _prompt(self, path: str, body: Mapping[str, Any]) -> Sequence[int]:
        request = understand(path, body)
        if isinstance(request, Unrenderable):
            raise ApiError(400, f"The prompt cannot be used: {request.reason}.")
        if isinstance(request, ChatPrompt):
            text = self._template.render(messages=request.messages, add_generation_prompt=request.add_generation_prompt)
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if isinstance(request, TextPrompt):
            return self._tokenizer.encode(request.text).ids
        return request.token_ids.tolist()
