"""The words of the project, as types. `ARCHITECTURE.md` says what each of them means.

A block key is a plain `int` (unsigned, 64 bits): there are millions of them, compared and never computed with.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

import msgspec

BlockKey = NewType("BlockKey", int)

KEY_MASK = (1 << 64) - 1


class Medium(StrEnum):
    """Where an engine holds a block, nearest first."""

    GPU = "gpu"
    CPU = "cpu"
    STORAGE = "storage"
    REMOTE = "remote"


class EngineId(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """One vLLM cache: `<host:port>` of the HTTP address it is served at, and its data-parallel rank there.

    Written `10.0.0.5:8000` for rank 0 and `10.0.0.5:8000/dp1` for rank 1. A struct that keeps its hash, because every
    choice looks up every engine in many books.
    """

    address: str
    rank: int = 0

    def __str__(self) -> str:
        return self.address if self.rank == 0 else f"{self.address}/dp{self.rank}"

    @classmethod
    def parse(cls, text: str) -> EngineId:
        """The inverse of `str`. Raises `ValueError` that quotes the text."""
        address, slash, rank = text.partition("/dp")
        host, colon, port = address.rpartition(":")
        if not (host and colon and _is_number(port) and 0 < int(port) < 65536):
            raise ValueError(f"engine {text!r} is not <host:port> or <host:port>/dp<N>")
        if slash and not _is_number(rank):
            raise ValueError(f"engine {text!r}: the rank after /dp is not a number")
        return cls(address, int(rank) if slash else 0)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5
