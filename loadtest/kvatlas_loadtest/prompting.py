"""From the body of a request to the token ids an engine computes: the one place that knows how to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvatlas_common.prompts.errors import PromptError
from kvatlas_common.prompts.prompt import PromptPipeline
from kvatlas_common.prompts.requests import COMPLETIONS, Unrenderable, understand
from kvatlas_loadtest.openai_shapes import ApiError

CACHE_BYTES_MAX = 64 << 20


class Prompter:
    """Tokenises for every engine that serves one model; several engines of a process may share it."""

    def __init__(self, pipeline: PromptPipeline) -> None:
        self._pipeline = pipeline

    @classmethod
    def load(cls, folder: Path) -> Prompter:
        """Raises `ModelFilesMissing`, `BadModelFiles`."""
        return cls(PromptPipeline.load(folder, cache_bytes_max=CACHE_BYTES_MAX))

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
        try:
            prompt = self._pipeline.tokenize(request)
        except PromptError as error:
            raise ApiError(400, f"The prompt cannot be used: {error}.") from None
        if not prompt.complete:
            raise ApiError(400, "This engine understands text only.")
        token_ids: list[int] = prompt.token_ids.tolist()
        return token_ids
