"""What is recorded of a request and of its answer, read from their bodies. Pure.

Only what vLLM (0.10 to 0.32, `entrypoints/openai/{chat_completion,completion}/protocol.py`) says of tokens is read;
every other field passes unread. A whole answer and a stream of chunks come to the same `Answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvatlas_common.prompts.requests import CHAT, COMPLETIONS, understand

RECORDED = (CHAT, COMPLETIONS, "/v1/responses", "/v1/messages")
_BEYOND_TOKENIZE = ("documents", "reasoning_effort", "truncate_prompt_tokens", "chat_template")
"""Fields that shape a prompt and that the engine's /tokenize does not know, or may refuse."""


@dataclass(frozen=True, slots=True)
class Request:
    """`rank`: the data-parallel rank it is pinned to, where the engine has several."""

    path: str
    body: Mapping[str, Any]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """None: the engine did not say. `output_token_ids` and `text` are those of the first choice."""

    status: int = 200
    cached_tokens: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    output_token_ids: list[int] = field(default_factory=list)
    text: str = ""
    says_usage: bool = False


def incomparable(request: Request) -> str:
    """Why the engine's `cached_tokens` for this request cannot be held against an index; empty when they can."""
    if request.path not in (CHAT, COMPLETIONS):
        return f"{request.path} does not tell its prompt tokens"
    if _has_media(request.body):
        return "not text alone"
    return understand(request.path, request.body).facts.incomparable


def to_tokenize(request: Request) -> Mapping[str, Any] | list[int] | None:
    """The body that has /tokenize answer this prompt's token ids, or these ids themselves; None when nothing has."""
    body = request.body
    if any(body.get(name) is not None for name in _BEYOND_TOKENIZE):
        return None
    if request.path == CHAT:
        return body
    if request.path != COMPLETIONS:
        return None
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        kept = {name: body[name] for name in ("model", "add_special_tokens") if name in body}
        return {**kept, "prompt": prompt}
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    return None


def read_answer(status: int, raw: bytes, streamed: bool) -> Answer:
    """Never raises: what cannot be read was not said."""
    if status != 200:
        return Answer(status=status)
    try:
        pages = [_decode(data) for data in (_chunks(raw) if streamed else [raw])]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Answer(status=status)
    usage = next((page.usage for page in reversed(pages) if page.usage is not None), None)
    details = usage.prompt_tokens_details if usage else None
    choices = [choice for page in pages for choice in page.choices if choice.index == 0]
    prompt_ids = [page.prompt_token_ids for page in pages] + [choice.prompt_token_ids for choice in choices]
    return Answer(
        status=status,
        cached_tokens=details.cached_tokens if details else None,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        prompt_token_ids=next((ids for ids in prompt_ids if ids), None),
        output_token_ids=[token for choice in choices for token in choice.token_ids or ()],
        text="".join(choice.said for choice in choices),
        says_usage=usage is not None,
    )


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def said(self) -> str:
        message = self.message or self.delta
        return (message.content if message else self.text) or ""


class _Page(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None


_decode = msgspec.json.Decoder(_Page).decode


def _chunks(raw: bytes) -> list[bytes]:
    """The JSON of every server-sent event."""
    lines = (line.removeprefix(b"data:").strip() for line in raw.splitlines() if line.startswith(b"data:"))
    return [data for data in lines if data and data != b"[DONE]"]


def _has_media(body: Mapping[str, Any]) -> bool:
    """Whether a message has a part that is not text."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type", "text") not in ("text", "input_text", "refusal"):
                return True
    return body.get("prompt_embeds") is not None
