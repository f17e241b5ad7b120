"""How names are spelled in settings and engine lists: `block_size`, `blockSize` and `block-size` are one name.

Whoever mistypes a name is told the nearest one that exists; a silently ignored setting is found out in production.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake(name: str) -> str:
    """`blockSize`, `block-size` -> `block_size`."""
    return _HUMP.sub("_", name.replace("-", "_")).lower()


def camel(name: str) -> str:
    """`block_size` -> `blockSize`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def kebab(name: str) -> str:
    """`block_size` -> `block-size`."""
    return name.replace("_", "-")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name nearest to `word`, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
