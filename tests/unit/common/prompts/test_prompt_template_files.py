"""Which of a model's templates is used."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kvatlas_common.prompts import BadModelFiles, BadTemplate, ModelFiles, PromptError
from kvatlas_common.prompts.template_files import ChatTemplates

NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


def chosen(folder: Path, with_tools: bool, given: str | None = None) -> str:
    templates = ChatTemplates.load(ModelFiles(folder), datetime.now, given)
    return templates.choose(with_tools).render([{"role": "user", "content": ""}])


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_named_templates_in_the_config(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_DOT_json={"chat_template": NAMED})
    assert (chosen(tmp_path, False), chosen(tmp_path, True)) == ("plain", "tools")


def test_files_win_over_the_config(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_DOT_json={"chat_template": NAMED}, chat_template_DOT_jinja="file")
    assert (chosen(tmp_path, False), chosen(tmp_path, True)) == ("file", "file")
    write(tmp_path, additional_chat_templates__tool_use_DOT_jinja="tool file")
    assert (chosen(tmp_path, False), chosen(tmp_path, True)) == ("file", "tool file")
    assert chosen(tmp_path, True, given="the engines' own") == "the engines' own"


def test_a_processors_template_is_for_requests_without_tools(tmp_path: Path) -> None:
    write(
        tmp_path,
        chat_template_DOT_json={"chat_template": "processor"},
        tokenizer_config_DOT_json={"chat_template": "t"},
    )
    assert chosen(tmp_path, False) == "t"
    write(tmp_path, preprocessor_config_DOT_json={})
    assert (chosen(tmp_path, False), chosen(tmp_path, True)) == ("processor", "t")


def test_without_a_template_there_are_no_chats(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        chosen(tmp_path, False)


@pytest.mark.parametrize(
    "files",
    [
        {"config_DOT_json": {"architectures": ["DeepseekV32ForCausalLM"]}},
        {"consolidated_DOT_safetensors": "", "tekken_DOT_json": {}},
    ],
)
def test_models_not_rendered_by_a_template_say_so(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, chat_template_DOT_jinja="x", **files)
    with pytest.raises(PromptError, match="not rendered by a chat template"):
        chosen(tmp_path, False)


def test_broken_templates_are_named(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_DOT_json={"chat_template": 5})
    with pytest.raises(BadModelFiles, match="chat_template"):
        chosen(tmp_path, False)
    write(tmp_path, chat_template_DOT_jinja="{% for %}")
    with pytest.raises(BadTemplate, match="default"):
        chosen(tmp_path, False)
