"""A prompt as the rest of the router sees it, wherever it was tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvatlas_common.blocks.extras import Lora, PromptExtras, UnknownExtra
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.fleet import EngineView
from kvatlas_common.history import ESTIMATE_PROFILE

ESTIMATE = ESTIMATE_PROFILE.name
Keys = npt.NDArray[np.uint64]


class Where(StrEnum):
    """Who turned the text into tokens."""

    LOCAL = "local"
    REMOTE = "remote"  # an engine, over HTTP
    GIVEN = "given"  # the request holds token ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """`keys`: hash profile name -> uint64[n], the blocks that may be served from a cache: all before the last token.

    `complete`: `token_ids` is all of the prompt; otherwise it goes on with what has no tokens here (an image).
    `comparable`: the engine will report the cached tokens of this prompt, and of nothing else.
    """

    token_ids: Sequence[int] | npt.NDArray[Any]
    keys: Mapping[str, Keys]
    complete: bool
    comparable: bool
    where: Where

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


class NoTokens(Exception):
    """The prompt's tokens are not known. `cause` goes into the reason of the choice."""

    def __init__(self, cause: str, text: str = "") -> None:
        super().__init__(text or cause)
        self.cause = cause


class KeysOf(Protocol):
    def __call__(self, profile: HashProfile, extras: PromptExtras) -> Keys:
        """Raises `UnknownExtra`."""
        ...


def keys_by_profile(
    keys_of: KeysOf, model: str, cache_salt: str | None, engines: Sequence[EngineView]
) -> dict[str, Keys]:
    """The prompt's keys under each hash profile of the engines; a profile that cannot be computed is left out.

    Where an engine's profile is not known, keys of our own serve to guess from where prompts were sent.
    """
    keys: dict[str, Keys] = {}
    for view in engines:
        profile = view.profile or ESTIMATE
        if profile in keys or view.known_empty:
            continue
        adapter = view.adapter(model)
        lora = Lora(adapter.name, adapter.number, adapter.path) if adapter else None
        try:
            keys[profile] = keys_of(_profile(profile), PromptExtras(lora, cache_salt))
        except (UnknownExtra, ValueError):
            continue
    return keys


@lru_cache(maxsize=256)
def _profile(name: str) -> HashProfile:
    return HashProfile.parse(name)
