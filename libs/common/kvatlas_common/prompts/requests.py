"""What a request body asks the engine to compute: a conversation, a text, token ids, or something not rendered here.

Reads what decides the prompt and what the router needs besides (model, salt, stream, ...); every other field passes
unread. What an engine would refuse, or what depends on settings that cannot be known here, is `Unrenderable` with the
reason: the request is then routed without keys, and the engine gives its own answer. Source: vLLM 0.32
entrypoints/openai/{chat_completion,completion}/protocol.py, entrypoints/serve/tokenize/protocol.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvatlas_common.prompts.as_chat import NotAsChat, messages_as_chat, responses_as_chat

TokenIds = npt.NDArray[np.uint32]
Body = Mapping[str, Any]

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"

_TAKEN_BY_RENDERING = frozenset(
    [
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "conversation",
        "messages",
        "self",
    ]
)
"""Names in `chat_template_kwargs` that would reach transformers' own arguments instead of the template."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for a request whatever its prompt. `max_tokens`: output tokens asked for, None if not said.

    `incomparable` is empty when the engine's `cached_tokens` will answer for this prompt alone, else says why not
    (vLLM 0.32 sampling_params.py: with prompt logprobs the cache is not read at all).
    """

    model: str | None = None
    cache_salt: str | None = None
    stream: bool = False
    n: int = 1
    max_tokens: int | None = None
    incomparable: str = ""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `tokens` of the prompt; `side` is where it is cut, None for the tokenizer's default."""

    tokens: int
    side: Literal["left", "right"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ChatPrompt:
    """A conversation to be rendered by the model's template. `tools`, `messages`, ...: as in the body, not yet read."""

    facts: Facts
    messages: Sequence[Any]
    tools: Sequence[Any] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    renames_reasoning: bool = True  # `reasoning_content` counts as `reasoning`; /tokenize does not do that
    truncation: Truncation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TextPrompt:
    """A text to be tokenised as it is."""

    facts: Facts
    text: str
    add_special_tokens: bool = True
    truncation: Truncation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenPrompt:
    """Token ids, uint32[n], computed as they are."""

    facts: Facts
    token_ids: TokenIds
    truncation: Truncation | None = None


PromptRequest = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class Unrenderable:
    """A request whose prompt cannot be known here. `reason` is short, without prompt text."""

    facts: Facts
    reason: str


class _Refused(Exception):
    """Carries the reason up to `understand`."""


def understand(path: str, body: Body) -> PromptRequest | Unrenderable:
    """`path`: of the request, without query. `body`: its JSON object. Never raises, whatever is in the body."""
    facts = _facts(path, body)
    reader = _READERS.get(path)
    if reader is None:
        return Unrenderable(facts, f"path {path}"[:80])
    try:
        if facts.cache_salt is None and body.get("cache_salt") is not None:
            raise _Refused("cache_salt is not a non-empty string")
        return reader(facts, body)
    except (_Refused, NotAsChat) as refused:
        return Unrenderable(facts, str(refused))


def token_array(ids: object) -> TokenIds | None:
    """uint32[n] of a sequence of integers within 0..2^32-1; None for anything else."""
    if isinstance(ids, np.ndarray):
        whole = ids.ndim == 1 and ids.dtype.kind in "iu"
        fits = whole and (ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < 1 << 32))
        return ids.astype(np.uint32) if fits else None
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        return None
    try:
        return np.frombuffer(array("I", ids), np.uint32)
    except (TypeError, ValueError, OverflowError):
        return None


def _facts(path: str, body: Body) -> Facts:
    model, salt, n = body.get("model"), body.get("cache_salt"), body.get("n")
    asked = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    return Facts(
        model=model if isinstance(model, str) else None,
        cache_salt=salt if isinstance(salt, str) and salt else None,
        stream=body.get("stream") is True,
        n=n if isinstance(n, int) and n > 0 else 1,
        max_tokens=asked if isinstance(asked, int) else None,
        incomparable=_incomparable(path, body),
    )


def _incomparable(path: str, body: Body) -> str:
    if body.get("n") not in (None, 1):
        return "n"
    if body.get("use_beam_search"):
        return "use_beam_search"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if body.get("echo") and (path == CHAT or body.get("logprobs") is not None):
        return "echo asks for prompt logprobs"
    if body.get("kv_transfer_params"):
        return "kv_transfer_params"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list):
        return "several prompts"
    return ""


def _chat(facts: Facts, body: Body) -> PromptRequest:
    handed_over = _mapping(body, "kv_transfer_params").get("prompt_token_ids")
    if handed_over is not None:
        raise _Refused("kv_transfer_params.prompt_token_ids")
    documents, effort = body.get("documents"), body.get("reasoning_effort")
    if documents is not None and not (isinstance(documents, list) and all(isinstance(d, Mapping) for d in documents)):
        raise _Refused("documents is not a list of objects")
    if effort is not None and not isinstance(effort, str):
        raise _Refused("reasoning_effort is not a string")
    return _conversation(facts, body, documents=documents, reasoning_effort=effort, truncation=_truncation(body))


def _tokenize(facts: Facts, body: Body) -> PromptRequest:
    if "messages" in body:
        return _conversation(facts, body, renames_reasoning=False)
    if not isinstance(body.get("prompt"), str):
        raise _Refused("neither messages nor a prompt string")
    return TextPrompt(facts, body["prompt"], _flag(body, "add_special_tokens", True))


def _conversation(facts: Facts, body: Body, **also: Any) -> ChatPrompt:
    messages, tools, kwargs = body.get("messages"), body.get("tools"), _mapping(body, "chat_template_kwargs")
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages is not a non-empty list")
    if tools is not None and not (isinstance(tools, list) and tools):
        raise _Refused("tools is not a non-empty list")
    if body.get("chat_template") is not None:
        raise _Refused("the request brings its own chat_template")
    if taken := sorted(_TAKEN_BY_RENDERING & kwargs.keys()):
        raise _Refused(f"chat_template_kwargs.{taken[0]}")
    prompts, continues = _flag(body, "add_generation_prompt", True), _flag(body, "continue_final_message", False)
    if prompts and continues:
        raise _Refused("both add_generation_prompt and continue_final_message")
    return ChatPrompt(
        facts,
        messages,
        tools,
        template_kwargs=kwargs,
        add_generation_prompt=prompts,
        continue_final_message=continues,
        add_special_tokens=_flag(body, "add_special_tokens", False),
        **also,
    )


def _completion(facts: Facts, body: Body) -> PromptRequest:
    for name in ("prompt_embeds", "suffix"):
        if body.get(name) is not None:
            raise _Refused(name)
    prompt, truncation = body.get("prompt"), _truncation(body)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # of several prompts the first decides where all of them go
    if isinstance(prompt, str) and prompt:
        return TextPrompt(facts, prompt, _flag(body, "add_special_tokens", True), truncation)
    ids = token_array(prompt)
    if ids is None or not ids.size:
        raise _Refused("prompt is neither text nor token ids")
    return TokenPrompt(facts, ids, truncation)


def _truncation(body: Body) -> Truncation | None:
    tokens, side = body.get("truncate_prompt_tokens"), body.get("truncation_side")
    if tokens is None:
        return None
    if not isinstance(tokens, int) or tokens < 1 or side not in (None, "left", "right"):
        raise _Refused("truncate_prompt_tokens that depends on the engine's settings")  # -1: its context length
    return Truncation(tokens, side)


def _flag(body: Body, name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise _Refused(f"{name} is not a boolean")
    return value


def _mapping(body: Body, name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _Refused(f"{name} is not an object")
    return value


_READERS: Mapping[str, Callable[[Facts, Body], PromptRequest]] = {
    CHAT: _chat,
    MESSAGES: lambda facts, body: _chat(facts, messages_as_chat(body)),
    RESPONSES: lambda facts, body: _chat(facts, responses_as_chat(body)),
    COMPLETIONS: _completion,
    TOKENIZE: _tokenize,
}
