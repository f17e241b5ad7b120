"""A model's files are found in folders and hub caches of this machine, or named as missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvatlas_common.prompts import BadModelFiles, ModelFiles, ModelFilesMissing, find_model_files

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A hub cache under HF_HOME with two snapshots of org/model, `main` being the older one."""
    model = tmp_path / "hub" / "models--org--model"
    for commit, age in ((OLD, 1000), (NEW, 2000)):
        folder = model / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
        os.utime(folder, (age, age))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(OLD)
    return tmp_path


def test_a_folder_is_taken_as_it_is(home: Path) -> None:
    folder = home / "hub" / "models--org--model" / "snapshots" / NEW
    assert find_model_files(str(folder), environ={}) == ModelFiles(folder)


def test_a_hub_name_is_looked_up_at_its_revision(home: Path) -> None:
    environ = {"HF_HOME": str(home)}
    assert find_model_files("org/model", environ=environ).folder.name == OLD
    assert find_model_files("org/model", environ=environ, revision=NEW).folder.name == NEW
    assert find_model_files("org/model", environ={"HF_HUB_CACHE": str(home / "hub")}).folder.name == OLD


def test_without_the_revision_the_newest_snapshot_serves(home: Path) -> None:
    (home / "hub" / "models--org--model" / "refs" / "main").write_text("c" * 40)
    assert find_model_files("org/model", environ={"HF_HOME": str(home)}).folder.name == NEW


def test_an_engines_own_cache_path_leads_to_ours(home: Path) -> None:
    root = f"/root/.cache/huggingface/hub/models--org--model/snapshots/{OLD}"
    assert find_model_files(root, environ={"HF_HOME": str(home)}).folder.name == OLD


def test_the_first_wanted_that_is_here_wins(home: Path) -> None:
    found = find_model_files("/models/not-here", "org/model", environ={"HF_HOME": str(home)})
    assert found.folder.name == OLD


def test_what_is_missing_says_where_it_looked_and_what_to_do(home: Path) -> None:
    with pytest.raises(ModelFilesMissing) as caught:
        find_model_files("org/other", "/models/x", environ={"HF_HOME": str(home)})
    text = str(caught.value)
    assert "models--org--other" in text
    assert "/models/x" in text
    assert "HF_HOME" in text
    assert caught.value.wanted == ("org/other", "/models/x")


@pytest.mark.parametrize("name", ["", "../../etc", "a/../b", "x\0y"])
def test_odd_names_are_missing_not_errors(home: Path, name: str) -> None:
    with pytest.raises(ModelFilesMissing):
        find_model_files(name, environ={"HF_HOME": str(home)})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    assert files.settings("tokenizer_config.json") == {}
    for text in ("[]", "{", "\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(BadModelFiles, match=r"tokenizer_config\.json"):
            files.settings("tokenizer_config.json")
