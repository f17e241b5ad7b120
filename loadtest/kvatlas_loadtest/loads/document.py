"""What a load test came to, as the file that the report is made of: the figures of every run, and how they were got."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import msgspec

from kvatlas_loadtest.loads.figures import Figures


class BadDocument(ValueError):
    """A file that is no such document."""


@dataclass(frozen=True, slots=True)
class Document:
    """`simulated`: in virtual time; only that can be held to what must hold. `whole`: the reference workload had its
    published size. `facts`: what, with what, on what; in words."""

    figures: tuple[Figures, ...]
    simulated: bool = False
    whole: bool = False
    facts: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(self))


def load(path: Path) -> Document:
    """Raises `BadDocument`, `OSError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Document)
    except msgspec.DecodeError as error:
        raise BadDocument(f"{path}: {error}") from None


def merged(documents: Sequence[Document]) -> Document:
    """Of several test runs. What they say differently is said of each in turn."""
    facts: dict[str, list[str]] = {}
    for document in documents:
        for name, text in document.facts.items():
            told = facts.setdefault(name, [])
            if text not in told:
                told.append(text)
    return Document(
        figures=tuple(figures for document in documents for figures in document.figures),
        simulated=all(document.simulated for document in documents),
        whole=all(document.whole for document in documents),
        facts={name: "; ".join(told) for name, told in facts.items()},
    )


def surroundings() -> dict[str, str]:
    """What every document says of where it was made."""
    return {
        "KV Atlas": metadata.version("kvatlas"),
        "Python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
    }
