# mypy: ignore-errors
"""Writes as_chat.json: what vLLM makes of Messages and Responses bodies before the chat template. Run by vLLM's Python.

<vllm venv>/bin/python tests/data/prompts/make_as_chat.py
"""

import json
from pathlib import Path

from pydantic import ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages, construct_tool_dicts

PNG = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
HI = {"role": "user", "content": "hi"}
CALL = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Zürich"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "snow"}
TEXT = {"type": "text", "text": "one"}
SAID = {"type": "output_text", "text": "yes", "annotations": []}
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Z"}'}

MESSAGES = [
    {"messages": [HI]},
    {"system": "be brief", "messages": [HI]},
    {"system": [TEXT, {"type": "text", "text": "x-anthropic-billing-header: 1"}, TEXT], "messages": [HI]},
    {"messages": [{"role": "user", "content": [TEXT]}]},
    {"messages": [{"role": "user", "content": [TEXT, {"type": "text", "text": "two"}]}]},
    {"messages": [{"role": "user", "content": [TEXT, {"type": "text", "text": ""}]}]},
    {"messages": [HI, {"role": "assistant", "content": "yes"}, HI]},
    {"messages": [HI, {"role": "assistant", "content": [TEXT, CALL]}, {"role": "user", "content": [RESULT]}]},
    {"messages": [HI, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT, TEXT]}]},
    {
        "messages": [
            HI,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, TEXT]},
            HI,
        ]
    },
    {"messages": [HI, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, HI]},
    {"messages": [{"role": "user", "content": [RESULT | {"content": [TEXT, {"type": "text", "text": "two"}]}]}]},
    {"messages": [{"role": "user", "content": [RESULT | {"content": None}]}]},
    {"messages": [HI], "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}]},
    {"messages": [HI], "tools": [{"name": "w", "input_schema": {"properties": {}}, "strict": True}]},
    {"messages": [HI], "thinking": {"type": "adaptive"}},
    {"messages": [HI], "output_config": {"effort": "high"}},
    {"messages": [HI], "chat_template_kwargs": {"enable_thinking": False}},
]
RESPONSES = [
    {"input": "hi"},
    {"input": "hi", "instructions": "be brief"},
    {"input": [HI]},
    {"input": [HI | {"type": "message"}]},
    {"input": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]},
    {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
        ]
    },
    {"input": [HI, {"role": "assistant", "content": "yes"}, HI]},
    {"input": [HI, {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [SAID]}, HI]},
    {"input": [HI, CALLED, {"type": "function_call_output", "call_id": "c1", "output": "snow"}]},
    {
        "input": [
            HI,
            CALLED,
            CALLED | {"call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "s"},
        ]
    },
    {"input": [HI, {"role": "assistant", "content": "yes"}, CALLED]},
    {
        "input": [
            HI,
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            CALLED,
        ]
    },
    {
        "input": [
            HI,
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [SAID]},
            HI,
        ]
    },
    {"input": "hi", "tools": [{"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA}]},
    {"input": "hi", "tools": [{"type": "function", "name": "w", "parameters": SCHEMA, "strict": True}]},
    {"input": "hi", "tools": []},
    {"input": "hi", "reasoning": {"effort": "low"}},
]


def messages(body: dict) -> dict:
    request = AnthropicMessagesRequest.model_validate(body | {"model": "m", "max_tokens": 1})
    chat = AnthropicServingMessages.to_chat_completion_request(request)
    tools = None if chat.tools is None else [tool.model_dump() for tool in chat.tools]
    return {"messages": plain(chat.messages), "tools": tools, "reasoning_effort": chat.reasoning_effort}


def responses(body: dict) -> dict:
    request = ResponsesRequest.model_validate(body | {"model": "m"})
    made = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
    tools = construct_tool_dicts(request.tools, request.tool_choice)
    effort = request.reasoning.effort if request.reasoning else None
    return {"messages": plain(made), "tools": tools, "reasoning_effort": effort}


def plain(made: list) -> list:
    return [{k: list(v) if k == "tool_calls" else v for k, v in dict(m).items()} for m in made]


def as_json(value: object) -> object:
    return value.model_dump() if hasattr(value, "model_dump") else list(value)  # pydantic's lazy lists, too


cases = []
for path, make, bodies in (("/v1/messages", messages, MESSAGES), ("/v1/responses", responses, RESPONSES)):
    for body in bodies:
        try:
            cases.append({"path": path, "body": body, "chat": make(body)})
        except ValidationError as error:
            print("refused by vLLM:", path, json.dumps(body), str(error)[:300])
out = Path(__file__).with_name("as_chat.json")
out.write_text(json.dumps(cases, default=as_json, indent=1, ensure_ascii=False) + "\n")
print(len(cases), "cases")
