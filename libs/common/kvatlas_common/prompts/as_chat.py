"""Requests of Anthropic's Messages API and OpenAI's Responses API as the chat completions an engine makes of them.

vLLM renders both by the chat template, after turning them into the messages and tools of a chat completion: the same is
done here, field by field, so that their prompts are known as exactly as those of a chat. What depends on the engine's
settings, on what it keeps, or on tools it runs itself is refused with the reason. Source: vLLM 0.32
entrypoints/anthropic/serving.py, entrypoints/openai/responses/{utils,protocol}.py, renderers/online_renderer.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]
Message = dict[str, Any]

_BILLING_HEADER = "x-anthropic-billing-header"  # differs with every request; the engine leaves it out
_BLOCKS = ("text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result")
_UNFINISHED = frozenset({"in_progress", "incomplete"})


class NotAsChat(Exception):
    """What the engine would make of it is not known here; the message says why, without prompt text."""


def messages_as_chat(body: Fields) -> dict[str, Any]:
    """The fields of a chat completion that decide the prompt of a `/v1/messages` body. Raises `NotAsChat`."""
    system = _system(body.get("system"))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for message in _objects(body.get("messages"), "messages"):
        messages += _anthropic(message)
    chat = _shared(body) | {"messages": messages}
    if body.get("tools") is not None:
        chat["tools"] = [_anthropic_tool(tool) for tool in _objects(body["tools"], "tools")]
    thinking, config = body.get("thinking"), body.get("output_config")
    if isinstance(thinking, Mapping) and thinking.get("type") == "disabled":
        raise NotAsChat("thinking is disabled")  # by what the engine finds out about its template
    if isinstance(config, Mapping) and config.get("effort") is not None:
        chat["reasoning_effort"] = config["effort"]
    return chat


def responses_as_chat(body: Fields) -> dict[str, Any]:
    """The same of a `/v1/responses` body."""
    for kept in ("previous_response_id", "previous_input_messages", "prompt"):
        if body.get(kept) is not None:
            raise NotAsChat(kept)
    if body.get("truncation", "disabled") != "disabled":
        raise NotAsChat("truncation that depends on the engine's settings")
    instructions, given = body.get("instructions"), body.get("input")
    messages: list[Message] = [{"role": "system", "content": _text(instructions)}] if instructions else []
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        items = _objects(given, "input")
        if items and str(items[-1].get("status")) in _UNFINISHED:
            raise NotAsChat("the last item is to be continued")
        for item in items:
            _add_item(messages, item)
    chat = _shared(body) | {"messages": messages}
    if body.get("tools"):
        chat["tools"] = [_response_tool(tool) for tool in _objects(body["tools"], "tools")]
    reasoning = body.get("reasoning")
    if isinstance(reasoning, Mapping) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    return chat


def _shared(body: Fields) -> dict[str, Any]:
    names = ("chat_template", "chat_template_kwargs", "kv_transfer_params")
    return {name: body[name] for name in names if body.get(name) is not None}


# -- Messages ----------------------------------------------------------------------------------------------------------


def _system(system: object) -> str:
    if not system:
        return ""
    if isinstance(system, str):
        return system
    texts = (_text(block.get("text") or "") for block in _objects(system, "system") if block.get("type") == "text")
    return "".join(text for text in texts if not text.startswith(_BILLING_HEADER))


def _anthropic(message: Fields) -> Iterator[Message]:
    """One message, and before it those of the tools whose results it brings."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise NotAsChat(f"a message by {'the system' if role == 'system' else 'somebody unknown'}")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    blocks: dict[str, list[Fields]] = {kind: [] for kind in _BLOCKS}
    given = _objects(content, "content")
    for block in given:
        kind = str(block.get("type"))
        if kind not in blocks or (kind == "tool_result" and role != "user"):
            raise NotAsChat("a block of a type not known here")
        blocks[kind].append(block)
    for block in blocks["tool_result"]:
        yield {"role": "tool", "tool_call_id": block.get("tool_use_id") or "", "content": _result(block)}
    out: Message = {"role": role}
    if thoughts := [_text(b["thinking"]) for b in blocks["thinking"] if b.get("thinking") is not None]:
        out["reasoning"] = "".join(thoughts)
    if blocks["tool_use"]:
        inputs = [(block, json.dumps(block.get("input") or {})) for block in blocks["tool_use"]]
        out["tool_calls"] = [_call(block.get("id"), block.get("name"), arguments) for block, arguments in inputs]
    if parts := [part for block in given for part in _part(block)]:
        out["content"] = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    if role == "assistant" or parts:
        yield out


def _part(block: Fields) -> list[Message]:
    if block["type"] == "image":
        return [{"type": "image_url", "image_url": {"url": ""}}]  # what it shows has no tokens here
    if block["type"] == "text" and block.get("text"):
        return [{"type": "text", "text": _text(block["text"])}]
    return []


def _result(block: Fields) -> str:
    content = block.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    items = _objects(content, "content of a tool_result")
    if any(item.get("type") != "text" for item in items):
        raise NotAsChat("a tool_result that is not text")
    return "\n".join(_text(item.get("text", "")) for item in items)


def _anthropic_tool(tool: Fields) -> Message:
    schema = tool.get("input_schema")
    if not isinstance(schema, Mapping):
        raise NotAsChat("a tool without input_schema")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": tool.get("strict"),
        "defer_loading": tool.get("defer_loading"),
    }
    return {"type": "function", "function": function}


# -- Responses ---------------------------------------------------------------------------------------------------------


def _add_item(messages: list[Message], item: Fields) -> None:
    """As a message of its own, or as part of the assistant's message before it."""
    before = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "function_call":
        if item.get("namespace"):
            raise NotAsChat("a tool in a namespace")
        call = _call(item.get("call_id"), item.get("name"), _text(item.get("arguments")))
        if before is None:
            messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            before.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "content": _text(item.get("output")), "tool_call_id": item.get("call_id")})
    elif kind == "reasoning":
        _say(messages, before, "reasoning", _reasoning(item))
    elif kind == "message" and role == "assistant":
        _say(messages, before, "content", _said(item.get("content")))
    elif kind == "message" and role in ("user", "system", "developer"):
        messages.append({"role": role, "content": _parts(item.get("content"))})
    else:
        raise NotAsChat("an input item of a type not known here")


def _say(messages: list[Message], before: Message | None, field: str, text: str) -> None:
    if before is not None and before.get(field) is None:
        before[field] = text
    else:
        messages.append({"role": "assistant", field: text})


def _reasoning(item: Fields) -> str:
    if item.get("encrypted_content"):
        raise NotAsChat("encrypted reasoning")
    for name in ("content", "summary"):
        if item.get(name):
            return _text(_objects(item[name], name)[0].get("text"))
    return ""


def _said(content: object) -> str:
    """Of several parts the engine takes the first."""
    return content if isinstance(content, str) else _text(_first(_objects(content, "content")).get("text"))


def _parts(content: object) -> str | list[Message]:
    if isinstance(content, str):
        return content
    parts = [dict(part) for part in _objects(content, "content")]
    return [part | {"type": "text"} if part.get("type") == "input_text" else part for part in parts]


def _response_tool(tool: Fields) -> Message:
    if tool.get("type") != "function":
        raise NotAsChat("a tool that the engine runs itself")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


# -- both --------------------------------------------------------------------------------------------------------------


def _call(call_id: object, name: object, arguments: str) -> Message:
    if not (isinstance(call_id, str) and call_id and isinstance(name, str)):
        raise NotAsChat("a tool call without id or name")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _objects(value: object, what: str) -> Sequence[Fields]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise NotAsChat(f"{what} is not a list of objects")
    return value


def _first(items: Sequence[Fields]) -> Fields:
    if not items:
        raise NotAsChat("a message without content")
    return items[0]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise NotAsChat("something that should be text is not")
    return value
