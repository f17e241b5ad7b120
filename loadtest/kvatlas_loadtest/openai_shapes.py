"""Answers and errors of the OpenAI API in the shapes of vLLM 0.32, as observed on it. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvatlas_common.fleet import Adapter

DONE = b"data: [DONE]\n\n"


class ApiError(Exception):
    """What is wrong with a request, as the client is told it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached` is of the last prompt, as vLLM counts it."""

    prompt: int
    completion: int
    cached: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Choice:
    """One sequence's answer, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None
    prompt_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What all parts of one answer share. `chat`: of /v1/chat/completions. `token_ids`: they were asked for."""

    id: str
    model: str
    created: int
    chat: bool
    token_ids: bool

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(choice) for choice in choices],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage.as_json(),
            "kv_transfer_params": None,
        }
        if self.chat:
            body["prompt_logprobs"] = None
            body["prompt_token_ids"] = list(choices[0].prompt_token_ids) if self.token_ids else None
        return body

    def _choice(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self.token_ids else None,
        }
        if self.chat:
            return body | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        prompt = list(choice.prompt_token_ids) if self.token_ids else None
        return body | {"text": choice.text, "prompt_logprobs": None, "prompt_token_ids": prompt}

    def role_chunk(self, choice: Choice) -> bytes:
        """The first chunk of a chat stream: the role, no content."""
        delta = {"role": "assistant", "content": ""}
        body = self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])
        body["prompt_token_ids"] = list(choice.prompt_token_ids) if self.token_ids else None
        return _event(body)

    def text_chunk(self, choice: Choice, text: str, token_ids: Sequence[int], first: bool) -> bytes:
        """More text of one choice, and why it ended if it has."""
        body: dict[str, Any] = {"index": choice.index}
        body |= {"delta": {"content": text}} if self.chat else {"text": text}
        body |= {"logprobs": None, "finish_reason": choice.finish_reason}
        if choice.finish_reason is not None or not self.chat:
            body["stop_reason"] = choice.stop_reason
        if not self.chat:
            body["prompt_token_ids"] = list(choice.prompt_token_ids) if self.token_ids and first else None
        body["token_ids"] = list(token_ids) if self.token_ids else None
        return _event(self._chunk([body]))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk, where `stream_options.include_usage` asked for it."""
        return _event(self._chunk([]) | {"usage": usage.as_json()})

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def models_page(model: str, root: str, adapters: Sequence[Adapter], max_model_len: int, created: int) -> dict[str, Any]:
    """`/v1/models`: the model, then its adapters, each with its path as `root` and the model as `parent`."""

    def card(name: str, root: str | None, parent: str | None, length: int | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": root,
            "parent": parent,
            "max_model_len": length,
            "permission": [],
        }

    cards = [card(model, root, None, max_model_len), *(card(a.name, a.path, model, None) for a in adapters)]
    return {"object": "list", "data": cards}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
