"""Messages as templates get them. The many shapes are compared with vLLM in test_prompt_reference; here, the rules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvatlas_common.prompts import ContentFormat, PromptError
from kvatlas_common.prompts.messages import conversation, tool_schemas, without_developer

TEXT, PARTS = ContentFormat.STRING, ContentFormat.OPENAI
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/i.png"}, "detail_level": 3}


def test_parts_become_lines_or_stay_parts() -> None:
    messages = [{"role": "user", "content": ["a", {"type": "text", "text": ""}, {"type": "text", "text": "b", "x": 1}]}]
    assert conversation(messages, TEXT, True).messages == [{"role": "user", "content": "a\nb"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b", "x": 1}]
    assert conversation(messages, PARTS, True).messages == [{"role": "user", "content": parts}]


def test_tool_results_are_text_even_where_parts_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    made = conversation([{"role": "tool", "tool_call_id": "1", "content": parts}], PARTS, True).messages
    assert made == [{"role": "tool", "content": "a\nb", "tool_call_id": "1"}]
    reference = [{"type": "tool_reference", "name": "f"}]
    made = conversation([{"role": "tool", "tool_call_id": "1", "content": reference}], PARTS, True).messages
    assert made[0]["content"] == reference


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"b": 1, "a": 2}', {"b": 1, "a": 2}), ("", {}), (None, {}), ("[1]", {}), ("not json", {}), ({"a": 1}, {"a": 1})],
)
def test_tool_call_arguments_are_objects(arguments: Any, read: dict[str, Any]) -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": arguments}, "id": "1"}
    (made,) = conversation([{"role": "assistant", "content": "", "tool_calls": [call]}], TEXT, True).messages
    assert made["tool_calls"][0]["function"]["arguments"] == read
    assert list(made["tool_calls"][0]) == ["id", "function", "type"]
    assert call["function"]["arguments"] == arguments, "the body must not be changed"


def test_reasoning_under_both_names() -> None:
    old, new = {"reasoning_content": "r"}, {"reasoning": "r"}
    for given, renames, expected in ((old, True, True), (old, False, False), (new, True, True), (new, False, True)):
        (made,) = conversation([{"role": "assistant", "content": "x"} | given], TEXT, renames).messages
        assert ("reasoning" in made, "reasoning_content" in made) == (expected, expected)


def test_developer_becomes_the_one_system_message() -> None:
    messages = conversation(
        [
            {"role": "developer", "content": "d", "tools": []},
            {"role": "user", "content": "u"},
            {"role": "system", "content": "s"},
        ],
        TEXT,
        True,
    ).messages
    assert without_developer(messages) == [{"role": "system", "content": "d\n\ns"}, {"role": "user", "content": "u"}]
    assert without_developer(messages[:2])[0] == {"role": "system", "content": "d"}
    assert without_developer(messages[1:]) == messages[1:]


def test_tools_have_known_fields_in_a_fixed_order() -> None:
    tools = [{"more": 1, "function": {"strict": None, "extra": 1, "parameters": {"z": 1, "a": 2}, "name": "f"}}]
    made = json.dumps(tool_schemas(tools))
    function = '{"name": "f", "description": null, "parameters": {"z": 1, "a": 2}}'
    assert made == f'[{{"type": "function", "function": {function}}}]'
    assert tool_schemas(None) is None


def test_what_is_no_text_has_two_stand_ins() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]}]
    made = conversation(messages, PARTS, True)
    assert made.messages[0]["content"] == [{"type": "text", "text": "see"}, {"type": "image", "detail_level": 3}]
    assert made.second is not None
    assert made.second[0]["content"][1]["type"] == "text"
    made = conversation(messages, TEXT, True)
    assert made.second is not None
    assert "see" not in made.messages[0]["content"]  # its place depends on the model's placeholder
    assert made.messages[0]["content"] != made.second[0]["content"]
    assert conversation([{"role": "user", "content": "x"}], TEXT, True).second is None


@pytest.mark.parametrize("part", [IMAGE, {"image_url": "u"}, {"type": "text", "uuid": "u", "video_url": "v"}])
def test_media_is_recognised_by_type_or_field(part: dict[str, Any]) -> None:
    assert conversation([{"role": "user", "content": [part]}], PARTS, True).second is not None


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"content": "no role"},
        {"role": 5, "content": "x"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "hologram"}]},
        {"role": "user", "content": [{"type": ["text"]}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "uuid": "u"}]},
        {"role": "assistant", "content": "", "tool_calls": {}},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "custom", "custom": {}}]},
        {"role": "assistant", "content": "", "tool_calls": ["x"]},
    ],
)
def test_malformed_messages_are_refused(message: Any) -> None:
    with pytest.raises(PromptError):
        conversation([message], PARTS, True)


@pytest.mark.parametrize("tool", ["x", {}, {"function": {}}, {"type": "web", "function": {"name": "f"}}])
def test_malformed_tools_are_refused(tool: Any) -> None:
    with pytest.raises(PromptError):
        tool_schemas([tool])
