"""Prompts of known length for a real vocabulary: `KVATLAS_BENCH_TOKENIZER` names a `tokenizer.json`, one that is
gzipped, or a folder with a model's files; without it the tiny one that is shipped is used, and the rows say so.

Texts are cut from the sources of Python's standard library: code and prose, the same on every machine with this Python.
"""

from __future__ import annotations

import gzip
import os
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from kvatlas_loadtest.engine import TINY_MODEL

_SAMPLE_CHARS = 4_000_000


def model_folder(folder: Path) -> tuple[Path, str]:
    """A folder with a tokenizer and a chat template, and how to call it. Raises `FileNotFoundError`."""
    named = os.environ.get("KVATLAS_BENCH_TOKENIZER")
    if not named:
        return TINY_MODEL, "tiny tokenizer: KVATLAS_BENCH_TOKENIZER names no other"
    given, made = Path(named), folder / "model"
    made.mkdir(parents=True)
    for source in (TINY_MODEL, given if given.is_dir() else TINY_MODEL):  # its own files win
        for file in source.iterdir():
            shutil.copy(file, made / file.name)
    tokenizer = made / "tokenizer.json"
    if given.is_dir() and (given / "tokenizer.json.gz").is_file():
        given = given / "tokenizer.json.gz"
    if given.suffix == ".gz":
        tokenizer.write_bytes(gzip.decompress(given.read_bytes()))
    elif given.is_file():
        shutil.copy(given, tokenizer)
    size = tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    return made, f"tokenizer of {size:,} entries"


class Texts:
    """Texts of so many tokens, no two with the same beginning."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._rng = random.Random(seed)
        self._lines = list(_lines())

    def cut(self, tokens: int) -> str:
        """Exactly so many tokens, up to what joins at its end."""
        start = self._rng.randrange(len(self._lines))
        text = f"# {self._rng.getrandbits(40):x}\n"
        while True:
            text += "".join(self._lines[start : start + tokens // 4])
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            if len(offsets) > tokens:
                return text[: offsets[tokens - 1][1]]
            start = self._rng.randrange(len(self._lines))


def _lines() -> Iterator[str]:
    read = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        yield from text.splitlines(keepends=True)
        read += len(text)
        if read > _SAMPLE_CHARS:
            return
