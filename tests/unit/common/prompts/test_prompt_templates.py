"""Chat templates: Hugging Face's Jinja, and which content they take."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from kvatlas_common.prompts import BadTemplate, PromptError
from kvatlas_common.prompts.templates import ChatTemplate

USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, lambda: datetime(2024, 7, 26))


def test_blocks_are_trimmed_and_loops_controlled() -> None:
    source = (
        "  {% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content }}\n{% endfor %}\n"
    )
    assert template(source).render([USER, USER]) == "hi\n"


def test_json_is_not_escaped() -> None:
    source = "{{ tools | tojson }}{{ tools[0] | tojson(indent=1, sort_keys=true) }}"
    rendered = template(source).render([USER], tools=[{"b": "<é'>", "a": 1}])
    assert rendered == '[{"b": "<é\'>", "a": 1}]{\n "a": 1,\n "b": "<é\'>"\n}'


def test_the_generation_tag_prints_its_body_in_a_scope_of_its_own() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert template(source).render([USER]) == "21"


def test_the_clock_is_an_argument() -> None:
    dated = template("{{ strftime_now('%d %b %Y') }}")
    assert dated.volatile
    assert dated.render([USER]) == "26 Jul 2024"
    assert not template(PLAIN).volatile


def test_only_what_the_template_mentions_is_given() -> None:
    source = "{{ bos_token }}{{ thinking is defined }}{{ other is defined }}"
    rendered = template(source).render([USER], special_tokens={"bos_token": "<s>"}, kwargs={"thinking": 1})
    assert rendered == "<s>TrueFalse"
    assert (
        template("{{ bos_token }}").render([USER], special_tokens={"bos_token": "a"}, kwargs={"bos_token": "b"}) == "b"
    )


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no') }}", "{{ messages[5].content }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}"]
)
def test_what_a_template_raises_is_a_prompt_error(source: str) -> None:
    with pytest.raises(PromptError, match="the chat template"):
        template(source).render([USER])


def test_the_sandbox_holds() -> None:
    with pytest.raises(PromptError, match="SecurityError"):
        template("{{ messages.__class__.__mro__ }}").render([USER])


def test_a_template_that_does_not_compile_is_named() -> None:
    with pytest.raises(BadTemplate, match=r"model/chat_template\.jinja"):
        ChatTemplate("{% if %}", datetime.now, "model/chat_template.jinja")


@pytest.mark.parametrize(
    ("source", "content", "rendered"),
    [
        (PLAIN, "so  ", "[user]hi;[assistant]so  "),
        ("{% for m in messages %}{{ m.content | trim }};{% endfor %}", "so  \n", "hi;so"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}", "so ", "hi;so "),
    ],
)
def test_a_final_message_is_left_open(source: str, content: str, rendered: str) -> None:
    def shaped(text: str) -> Any:
        return [{"type": "text", "text": text}] if "p.text" in source else text

    final = {"role": "assistant", "content": shaped(content)}
    messages = [{"role": "user", "content": shaped("hi")}, final]
    made = template(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert made == rendered
    assert final["content"] == shaped(content)


def test_a_final_message_the_template_does_not_print_cannot_be_continued() -> None:
    final = {"role": "assistant", "content": "a</think>b"}
    for source in ("{% for m in messages %}{{ m.content.split('</think>')[0] }}{% endfor %}", "{{ messages[0].role }}"):
        with pytest.raises(PromptError, match="continue_final_message"):
            template(source).render([USER, final], add_generation_prompt=False, continue_final_message=True)


EACH = "{% for m in messages %}"
SHOW = "{% macro show(x) %}{% for p in x %}{{ p }}{% endfor %}{% endmacro %}" + EACH
ENDS = "{{ p }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(  # each verified against vLLM 0.32's own detection
    ("source", "detected"),
    [
        (PLAIN, "string"),
        (EACH + "{% for p in m.content %}" + ENDS, "openai"),
        (EACH + "{% for p in m['content'] | list %}" + ENDS, "openai"),
        (EACH + "{% for p in m.content if p %}" + ENDS, "openai"),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for p in m['content'] %}" + ENDS, "openai"),
        ("{% set a = messages %}{% set b = a | list %}{% for m in b %}{% for p in m.content[1:] %}" + ENDS, "openai"),
        ("{% set messages = messages %}" + EACH + "{% for p in m.content %}" + ENDS, "openai"),
        (EACH + "{% set content = m.content %}{% for p in content %}" + ENDS, "openai"),
        (EACH + "{% set body = m.content %}{% for p in body %}" + ENDS, "string"),
        (SHOW + "{{ show(m.content) }}{% endfor %}", "openai"),
        (SHOW + "{{ show(x=m['content']) }}{% endfor %}", "openai"),
        (SHOW + "{{ show(m.role) }}{% endfor %}", "string"),
        ("{% macro show(content) %}{% for p in content %}{% endfor %}{% endmacro %}{{ show('a') }}", "string"),
        (EACH + "{% for p in m.tool_calls %}" + ENDS, "string"),
        ("{% for a, b in messages %}{% for p in a.content %}" + ENDS, "string"),
        (EACH + "{% for p, q in m.content %}" + ENDS, "string"),
        (
            "{% set ns = namespace(m=[]) %}{% set ns.m = messages %}" + EACH + "{% for p in m.content %}" + ENDS,
            "string",
        ),
        ("{% for m in loop_messages %}{% for p in m.content %}" + ENDS, "string"),
    ],
)
def test_content_is_parts_where_the_template_loops_over_it(source: str, detected: str) -> None:
    assert template(source).content_format == detected
