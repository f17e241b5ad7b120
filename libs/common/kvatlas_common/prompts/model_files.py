"""The files of a model on this machine: tokenizer, its settings, chat templates. Never from the network.

A model is wanted by a folder, by its hub name, or by what an engine calls its `root`, which is either of the two on the
engine's machine. A folder counts when it holds `tokenizer.json`; a hub name is looked up in the hub cache, whose layout
is `models--org--name/{refs/<revision>, snapshots/<commit>/}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvatlas_common.prompts.errors import BadModelFiles, ModelFilesMissing

TOKENIZER = "tokenizer.json"
FILE_BYTES_MAX = 256 << 20

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IN_A_CACHE = re.compile(r"models--(?P<name>[\w.-]+?)/snapshots/(?P<commit>[\w.-]+)/?$")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that holds a `tokenizer.json`."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    def text(self, name: str) -> str | None:
        """A file's text, None if there is no such file. Raises `BadModelFiles`."""
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > FILE_BYTES_MAX:
                raise BadModelFiles(f"{path}: larger than {FILE_BYTES_MAX} bytes")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadModelFiles(f"{path}: {error}") from error

    def settings(self, name: str) -> dict[str, Any]:
        """A file's JSON object, empty if there is no such file. Raises `BadModelFiles`."""
        text = self.text(name)
        try:
            value = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadModelFiles(f"{self.folder / name}: {error}") from error
        if not isinstance(value, dict):
            raise BadModelFiles(f"{self.folder / name}: not a JSON object")
        return value


def find_model_files(*wanted: str, environ: Mapping[str, str], revision: str = "main") -> ModelFiles:
    """The files of the first of `wanted` (folders or hub names) that are on this machine.

    `environ` names the hub cache as Hugging Face's tools do: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME. Raises
    `ModelFilesMissing`.
    """
    looked: list[Path] = []
    for name in wanted:
        for folder in _folders(name, environ, revision):
            if (folder / TOKENIZER).is_file():
                return ModelFiles(folder)
            looked.append(folder)
    raise ModelFilesMissing(wanted, looked)


def _folders(name: str, environ: Mapping[str, str], revision: str) -> Iterator[Path]:
    if not name or "\0" in name:
        return
    yield Path(name)
    cached = _IN_A_CACHE.search(name)
    if cached is not None:  # an engine's path into the cache of its own machine
        yield from _snapshots(cached["name"], environ, cached["commit"])
    elif _HUB_NAME.fullmatch(name) and ".." not in name:
        yield from _snapshots(name.replace("/", "--"), environ, revision)


def _snapshots(cached_name: str, environ: Mapping[str, str], revision: str) -> Iterator[Path]:
    """The revision itself, then what there is, newest first: an old tokenizer nearly always equals the new one."""
    for cache in _caches(environ):
        model = cache / f"models--{cached_name}"
        reference = model / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        yield model / "snapshots" / commit
        if (model / "snapshots").is_dir():
            others = [p for p in (model / "snapshots").iterdir() if p.name != commit]
            yield from sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)


def _caches(environ: Mapping[str, str]) -> Iterator[Path]:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            yield Path(environ[variable]).expanduser()
    if environ.get("HF_HOME"):
        yield Path(environ["HF_HOME"]).expanduser() / "hub"
    elif environ.get("XDG_CACHE_HOME"):
        yield Path(environ["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    elif environ.get("HOME"):
        yield Path(environ["HOME"]) / ".cache" / "huggingface" / "hub"
