"""Messages and tools of a request, as an engine hands them to the chat template.

Between body and template an engine reshapes nearly everything: parts become text or plain dicts, tool-call arguments
become objects, fields change place, and a `developer` becomes a `system` for templates that know no such role. Order of
keys matters too, because templates print whole objects. Source: vLLM 0.32 renderers/chat_utils.py (messages),
renderers/hf.py (developer role), entrypoints/openai/chat_completion/protocol.py and generate/base/protocol.py (tools).

What has no text (images, audio, ...) ends what can be known of the prompt. Such a conversation is made twice, each time
with another *stand-in*, so that the caller can tell by comparing how far the rendered text does not depend on it: as
the template's own part and as a text that cannot be confused with it, or, where the template takes no parts and the
placeholder is the model's affair, as two texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvatlas_common.prompts.errors import PromptError

Message = dict[str, Any]


class ContentFormat(StrEnum):
    """What a template takes as `content`: one text, or a list of parts (vLLM's names)."""

    STRING = "string"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages ready for the template. `second`: the same with the other stand-ins; None if all of it is text."""

    messages: list[Message]
    second: list[Message] | None = None


_TEXT_FIELD = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_SKIPPED_IF_NONE = ("text", "refusal")
_MODALITY = {
    "image_url": "image",
    "input_image": "image",
    "image_embeds": "image",
    "image_pil": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "audio_embeds": "audio",
    "video_url": "video",
    "video_embeds": "video",
    "prompt_embeds": "prompt_embeds",
}
_PART_FIELDS = frozenset(_MODALITY) - {"input_image", "prompt_embeds"} | frozenset(
    ["closed", "data", "file", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid"]
)
"""Fields of parts that vLLM knows; it passes all others on to templates that take parts."""

_STAND_INS = ("\ue000kvatlas\ue000", "\ue001kvatlas\ue001")  # private characters: no text begins with both
_BILLING_HEADER = "x-anthropic-billing-header"


def conversation(messages: Sequence[Any], content_format: ContentFormat, renames_reasoning: bool) -> Conversation:
    """Raises `PromptError` where an engine would refuse the messages, or might."""
    first, second = (_Reading(content_format, renames_reasoning, stand_in) for stand_in in _STAND_INS)
    read = [first.message(m) for m in messages]
    return Conversation(read, [second.message(m) for m in messages] if first.has_non_text else None)


def without_developer(messages: list[Message]) -> list[Message]:
    """For a template that knows no `developer`: as `system`, all of which then become one message at the front."""
    if all(m["role"] != "developer" for m in messages):
        return messages
    renamed = [
        {k: v for k, v in m.items() if k != "tools"} | {"role": "system"} if m["role"] == "developer" else m
        for m in messages
    ]
    system = [m for m in renamed if m["role"] == "system"]
    if renamed[:1] == system:
        return renamed
    texts = [_text_of(m.get("content", "")) for m in system]
    merged = {"role": "system", "content": "\n\n".join(t for t in texts if t)}
    return [merged, *(m for m in renamed if m["role"] != "system")]


def tool_schemas(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Tools as templates get them: known fields in a fixed order, others dropped, absent ones None."""
    return None if tools is None else [_tool(tool) for tool in tools]


class _Reading:
    """One pass over the messages of a request, with one stand-in."""

    def __init__(self, content_format: ContentFormat, renames_reasoning: bool, stand_in: str) -> None:
        self.as_parts = content_format is ContentFormat.OPENAI
        self.renames_reasoning = renames_reasoning
        self.stand_in = stand_in
        self.has_non_text = False

    def message(self, message: Any) -> Message:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError("a message without a role")
        role = message["role"]
        out: Message = {"role": role, "content": self._content(role, message.get("content"))}
        if role == "assistant":
            _add_calls(out, message.get("tool_calls"))
            reasoning = message.get("reasoning")
            if reasoning is None and self.renames_reasoning:
                reasoning = message.get("reasoning_content")
            if reasoning is not None:
                out["reasoning"] = out["reasoning_content"] = reasoning
        elif role == "tool":
            if "tool_call_id" in message:
                out["tool_call_id"] = message["tool_call_id"]
            if isinstance(out["content"], list) and all(p["type"] == "text" for p in out["content"]):
                out["content"] = "\n".join(p["text"] for p in out["content"])
        for name in ("name", "task"):
            if isinstance(message.get(name), str):
                out[name] = message[name]
        if role == "developer":
            out["tools"] = _developer_tools(message.get("tools"))
        return out

    def _content(self, role: str, content: Any) -> str | list[dict[str, Any]]:
        if content is None:
            content = []
        elif isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif not isinstance(content, list):
            raise PromptError("content is neither text nor a list of parts")
        if role == "system":
            content = _without_billing_header(content)
        parts = [kept for part in content if (kept := self._part(part))]
        if self.as_parts:
            return parts
        if any(part is _NON_TEXT for part in parts):
            return self.stand_in  # where its placeholders go depends on the model: nowhere before this
        return "\n".join(parts)

    def _part(self, part: Any) -> Any:
        """One part as text, or as a dict where the template takes parts; None if vLLM drops it."""
        if isinstance(part, str):
            return {"type": "text", "text": part} if self.as_parts else part
        if not isinstance(part, Mapping):
            raise PromptError("a content part is neither text nor an object")
        kind = part.get("type")
        if not isinstance(kind, str | None):
            raise PromptError("a content part whose type is no text")
        if kind is None or part.get("uuid") is not None:
            kind = next((field for field in _MODALITY if field in part), None)
        elif kind in _TEXT_FIELD:
            return self._text_part(kind, part)
        elif kind == "tool_reference":
            return {"type": kind, "name": part.get("name")} if self.as_parts else part.get("name")
        if kind not in _MODALITY:
            raise PromptError("a content part of an unknown type")
        self.has_non_text = True
        if not self.as_parts:
            return _NON_TEXT
        if self.stand_in is _STAND_INS[0] and kind != "prompt_embeds":
            return {"type": _MODALITY[kind]} | _unknown_fields(part)
        return {"type": "text", "text": self.stand_in}

    def _text_part(self, kind: str, part: Mapping[str, Any]) -> Any:
        text = part.get(_TEXT_FIELD[kind])
        if text is None and kind in _SKIPPED_IF_NONE:
            return None
        if not isinstance(text, str):
            raise PromptError(f"a {kind} part without its text")
        return {"type": "text", "text": text} | _unknown_fields(part) if self.as_parts else text


_NON_TEXT = object()


def _unknown_fields(part: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k not in _PART_FIELDS}


def _without_billing_header(parts: Iterable[Any]) -> Iterator[Any]:
    """Without the attribution line of one client, which differs on every request: vLLM drops it."""
    for part in parts:
        plain = isinstance(part, str)
        text = part if plain else part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not (isinstance(text, str) and text.startswith(_BILLING_HEADER)):
            yield part
        elif rest := text.partition("\n")[2]:
            yield rest if plain else {**part, "text": rest}


def _add_calls(out: Message, calls: Any) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise PromptError("tool_calls is not a list")
    if calls:
        out["tool_calls"] = [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise PromptError("a tool call that is not of a function")
    function = _ordered(function, ("arguments", "name")) | {"arguments": _arguments(function.get("arguments"))}
    return _ordered(call, ("id", "function", "type")) | {"function": function}


def _arguments(arguments: Any) -> Mapping[str, Any]:
    """As an object. What is not one counts as empty: an earlier turn's mistake must not fail all later ones."""
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return {}
        except (ValueError, RecursionError):
            raise PromptError("tool-call arguments that cannot be read") from None
    return arguments if isinstance(arguments, Mapping) else {}


def _developer_tools(tools: Any) -> Any:
    """Known fields first, if each of them is what OpenAI calls a tool; else vLLM passes them on as they are."""
    order = ("name", "description", "parameters", "strict")
    ordered = []
    for tool in tools if isinstance(tools, list) else ():
        match tool:
            case {"type": "function", "function": {"name": str()} as function}:
                ordered.append(_ordered(tool, ("function", "type")) | {"function": _ordered(function, order)})
            case _:
                return tools
    return ordered or tools


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise PromptError("a tool that is not a function")
    name, description, parameters = (function.get(k) for k in ("name", "description", "parameters"))
    if (
        not isinstance(name, str)
        or not isinstance(description, str | None)
        or not isinstance(parameters, Mapping | None)
    ):
        raise PromptError("a tool whose name, description or parameters are of the wrong type")
    deferred = tool.get("defer_loading")
    optional = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading")}
    if optional["defer_loading"] is None:
        optional["defer_loading"] = deferred
    schema = {"name": name, "description": description, "parameters": parameters}
    schema |= {k: v for k, v in optional.items() if v is not None}
    out = {"type": "function", "function": schema}
    return out if deferred is None else out | {"defer_loading": deferred}


def _ordered(fields: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {k: fields[k] for k in first if k in fields} | {k: v for k, v in fields.items() if k not in first}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)
