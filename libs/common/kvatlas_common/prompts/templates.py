"""The model's chat template, rendered as an engine renders it: Jinja in a sandbox, with Hugging Face's additions.

Those are: blocks trimmed and left-stripped, loop controls, `tojson` that escapes nothing, `raise_exception`,
`strftime_now`, the `generation` tag (which only marks what a model said), and special tokens as variables.
Source: transformers 5.19 utils/chat_template_utils.py and tokenization_utils_base.py, `apply_chat_template`; which
arguments a template gets: vLLM 0.32 renderers/hf.py, `resolve_chat_template_kwargs`.

The clock is an argument. A template that asks for it is *volatile*: right now, and another prompt tomorrow.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvatlas_common.prompts.content_format import content_format
from kvatlas_common.prompts.errors import BadTemplate, PromptError
from kvatlas_common.prompts.messages import Message

Clock = Callable[[], datetime]

_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""What transformers appends to a message to be continued; the prompt ends where the template has put it."""


class ChatTemplate:
    """One compiled template. `content_format`: what it takes as content; `volatile`: it asks for the time."""

    def __init__(self, source: str, now: Clock, name: str = "chat template") -> None:
        """Raises `BadTemplate`, naming `name`."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(tree)  # before functions become globals
            environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda f: now().strftime(f)}
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadTemplate(f"{name}: {error}") from error
        self._source = source
        self.volatile = "strftime_now" in self._variables
        self.knows_developer = '"developer"' in source or "'developer'" in source
        self.content_format = content_format(tree)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special_tokens: Mapping[str, str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `kwargs` that the template does not mention have no effect.

        Raises `PromptError` when the template refuses the conversation or fails on it.
        """
        given = {k: v for k, v in (kwargs or {}).items() if k in self._variables}
        final = _open_ended(messages, self._source) if continue_final_message else None
        try:
            text = self._template.render(
                {**(special_tokens or {}), **given},
                messages=messages if final is None else final[0],
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise PromptError(f"the chat template: {type(error).__name__}") from error
        return text if final is None else _up_to_the_end(text, final[1])


def _open_ended(messages: Sequence[Message], source: str) -> tuple[list[Message], str]:
    """The messages with the last one's text marked at its end, and that text."""
    last = copy.deepcopy(messages[-1])
    content = last["content"]
    if "content" not in source:
        raise PromptError("continue_final_message: the template prints no content")
    if isinstance(content, str):
        last["content"] = content + _END_TAG
    else:
        part = next((p for p in reversed(content) if "text" in p), None)
        if part is None:
            raise PromptError("continue_final_message: the final message has no text")
        content = part["text"]
        part["text"] = content + _END_TAG
    return [*messages[:-1], last], content


def _up_to_the_end(text: str, content: str) -> str:
    end = text.rfind(_END_TAG.strip())
    if end < 0 or content.strip() not in text:
        raise PromptError("continue_final_message: the template does not print the final message as it is")
    trimmed = not text.startswith(_END_TAG, end)
    return text[:end].rstrip() if trimmed else text[:end]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` prints its body. A call block, because that decides scoping."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
