"""Messages and Responses bodies become the chats that vLLM makes of them; what it is not known to make says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.prompts import ChatPrompt, Unrenderable, understand
from kvatlas_common.prompts.as_chat import messages_as_chat, responses_as_chat
from kvatlas_common.prompts.messages import ContentFormat, conversation, tool_schemas

CASES = json.loads((Path(__file__).parents[3] / "data" / "prompts" / "as_chat.json").read_text())
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
AS_CHAT = {MESSAGES: messages_as_chat, RESPONSES: responses_as_chat}
HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['path'][4:]} {json.dumps(case['body'])[:60]}")
def test_the_chat_is_the_one_vllm_makes(case: dict[str, Any]) -> None:
    chat, wanted = AS_CHAT[case["path"]](case["body"]), case["chat"]
    for content_format in ContentFormat:  # as the template gets them: fields that no template sees may differ
        assert conversation(chat["messages"], content_format, True) == conversation(
            wanted["messages"], content_format, True
        )
    made = json.dumps(tool_schemas(chat.get("tools")))  # the order of keys is printed by templates, so it counts
    assert made == json.dumps(wanted["tools"])
    assert chat.get("reasoning_effort") == wanted["reasoning_effort"]


def test_facts_are_those_of_the_request() -> None:
    request = understand(RESPONSES, {"model": "m", "input": "hi", "max_output_tokens": 5, "cache_salt": "s"})
    assert isinstance(request, ChatPrompt)
    assert (request.facts.model, request.facts.max_tokens, request.facts.cache_salt) == ("m", 5, "s")
    request = understand(MESSAGES, {"model": "m", "messages": [HI], "max_tokens": 5, "stream": True})
    assert isinstance(request, ChatPrompt)
    assert (request.facts.max_tokens, request.facts.stream) == (5, True)


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (MESSAGES, {}, "messages is not a list of objects"),
        (MESSAGES, {"messages": []}, "messages is not a non-empty list"),
        (MESSAGES, {"messages": [HI, {"role": "system", "content": "s"}]}, "a message by the system"),
        (MESSAGES, {"messages": [HI], "thinking": {"type": "disabled"}}, "thinking is disabled"),
        (MESSAGES, {"messages": [HI], "tools": []}, "tools is not a non-empty list"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "a type not known"),
        (MESSAGES, {"messages": [HI], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        (RESPONSES, {}, "input is not a list of objects"),
        (RESPONSES, {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        (RESPONSES, {"input": "x", "truncation": "auto"}, "truncation"),
        (RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, "runs itself"),
        (RESPONSES, {"input": [{"role": "assistant", "content": "x", "status": "incomplete"}]}, "to be continued"),
        (RESPONSES, {"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "encrypted"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "a type not known"),
    ],
)
def test_what_is_not_rendered_says_why(path: str, body: dict[str, Any], reason: str) -> None:
    request = understand(path, body)
    assert isinstance(request, Unrenderable)
    assert reason in request.reason


LEAVES = st.none() | st.booleans() | st.sampled_from(["user", "assistant", "message", "text", "tool_result", "x", ""])
NAMES = st.sampled_from(
    ["messages", "input", "system", "role", "content", "type", "text", "status", "tools", "output", "reasoning", "name"]
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from([MESSAGES, RESPONSES]), st.dictionaries(NAMES, JSON, max_size=6))
def test_any_body_is_read(path: str, body: dict[str, Any]) -> None:
    understand(path, body)
