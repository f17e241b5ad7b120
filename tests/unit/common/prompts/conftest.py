"""Models made of the tiny one: the same vocabulary with other special tokens, templates and post-processors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from kvatlas_common.prompts import PromptPipeline

DATA = Path(__file__).parents[3] / "data"
TINY = DATA / "models" / "tiny"

Folder = Callable[[str], Path]
Pipeline = Callable[[str], PromptPipeline]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of `tiny`, `qwen_like` (text content) or `llama_like` (parts, a beginning-of-text token)."""
    made: dict[str, Path] = {"tiny": TINY}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = _changed(DATA / "prompts" / "models" / name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def _changed(source: Path, into: Path) -> Path:
    definition = json.loads((TINY / "tokenizer.json").read_text())
    changes = json.loads((source / "tokenizer_changes.json").read_text())
    definition["added_tokens"] += changes.pop("added_tokens")
    (into / "tokenizer.json").write_text(json.dumps(definition | changes))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(source / name, into / name)
    return into


@pytest.fixture(scope="session")
def pipeline(model_folder: Folder) -> Pipeline:
    """One pipeline per model, shared by all tests: what it remembers must never show."""
    loaded: dict[str, PromptPipeline] = {}

    def load(name: str) -> PromptPipeline:
        if name not in loaded:
            loaded[name] = PromptPipeline.load(model_folder(name), now=lambda: datetime(2026, 11, 22))
        return loaded[name]

    return load
