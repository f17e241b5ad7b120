"""Token ids from an engine's `/tokenize`, for prompts that cannot be tokenised here.

What `/tokenize` would answer otherwise than the request itself (documents, truncation, parts that are no text) is not
asked. Answers are kept, since conversations repeat in retries and debugging; the oldest go first.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from pydantic import SecretStr

from kvatlas_common.engines.asking import AskFailed, tokenize
from kvatlas_common.fleet import EngineView
from kvatlas_common.prompts import ChatPrompt, TextPrompt, TokenizedPrompt, from_token_ids
from kvatlas_router.core.prompt import NoTokens

KEPT_MAX = 1024
KEPT_TOKENS_MAX = 8_000_000  # 32 MB


class RemoteTokens:
    """Asks engines, one answer per prompt and model."""

    def __init__(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._kept: OrderedDict[bytes, TokenizedPrompt] = OrderedDict()
        self._kept_tokens = 0

    async def ask(self, view: EngineView, body: Mapping[str, Any], api_key: SecretStr | None) -> TokenizedPrompt:
        """Raises `NoTokens`."""
        key = hashlib.blake2b(json.dumps(body).encode(), digest_size=16).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            ids = await tokenize(self._session, view.url, body, api_key=api_key, timeout_s=self._timeout_s)
            prompt = from_token_ids(ids)
        except (AskFailed, ValueError) as error:
            raise NoTokens("tokenizer", f"{view.id}: {error}") from None
        self._keep(key, prompt)
        return prompt

    def _keep(self, key: bytes, prompt: TokenizedPrompt) -> None:
        self._kept[key] = prompt
        self._kept_tokens += prompt.n_tokens
        while len(self._kept) > KEPT_MAX or self._kept_tokens > KEPT_TOKENS_MAX:
            self._kept_tokens -= self._kept.popitem(last=False)[1].n_tokens


def tokenize_body(request: ChatPrompt | TextPrompt, model: str) -> dict[str, Any]:
    """The body that makes `/tokenize` answer for this request (vLLM 0.32 serve/tokenize/protocol.py).

    Raises `NoTokens` where there is none.
    """
    if request.truncation is not None:
        raise NoTokens("tokenizer", "truncation is not known to /tokenize")
    if isinstance(request, TextPrompt):
        return {"model": model, "prompt": request.text, "add_special_tokens": request.add_special_tokens}
    if request.documents is not None or request.reasoning_effort is not None:
        raise NoTokens("tokenizer", "documents and reasoning_effort are not known to /tokenize")
    if not all(map(_is_text, request.messages)):
        raise NoTokens("tokenizer", "parts that are not text cannot be tokenised by /tokenize alone")
    body: dict[str, Any] = {
        "model": model,
        "messages": request.messages,
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        "add_special_tokens": request.add_special_tokens,
    }
    if request.tools is not None:
        body["tools"] = request.tools
    if request.template_kwargs:
        body["chat_template_kwargs"] = request.template_kwargs
    return body


def _is_text(message: object) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Sequence) or isinstance(content, str):
        return True
    return all(isinstance(p, str) or (isinstance(p, Mapping) and p.get("type") in ("text", "refusal")) for p in content)
