"""The scripts the store runs in Redis, as texts. All keys of a call share one hash tag, and all of them are named."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    text: bytes
    sha: bytes

    @classmethod
    def load(cls, name: str) -> Script:
        """The text of `<name>.lua` beside this module."""
        return cls.of(files(__package__).joinpath(f"{name}.lua").read_bytes())

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, text: bytes) -> Script:
        return cls(text, hashlib.sha1(text).hexdigest().encode())
