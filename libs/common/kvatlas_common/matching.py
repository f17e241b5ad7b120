"""What a lookup answers, as both services speak of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvatlas_common.words import EngineId, Medium

PromptKeys: TypeAlias = Sequence[int] | NDArray[np.uint64]
"""Of a prompt, first block first."""

Prompts: TypeAlias = Mapping[str, PromptKeys]
"""Hash profile name -> the prompt's block keys under it."""


class EngineMatch(NamedTuple):
    """How many leading blocks of a prompt one engine would serve from its cache.

    `media` says where they are (it sums to `blocks`); `doubtful`, how many of them rest on entries that a lost message
    has put in doubt; `expected` (>= `blocks`), how many it would serve when what was routed there lately, and is not
    confirmed by events yet, is counted as held. A tuple because a lookup makes one per engine, and a frozen dataclass
    takes three times as long.
    """

    engine: EngineId
    blocks: int
    media: Mapping[Medium, int]
    exact: bool
    doubtful: int = 0
    expected: int = 0


@dataclass(frozen=True, slots=True)
class MatchAnswer:
    """`matches` lists only engines that hold something or are expected to.

    `unknown`: those of whose cache nothing can be said.
    """

    matches: tuple[EngineMatch, ...] = ()
    unknown: tuple[EngineId, ...] = ()

    def among(self, engines: Collection[EngineId]) -> MatchAnswer:
        """Of these engines alone; with none given, of all."""
        if not engines:
            return self
        wanted = frozenset(engines)
        return MatchAnswer(
            tuple(match for match in self.matches if match.engine in wanted),
            tuple(engine for engine in self.unknown if engine in wanted),
        )


@dataclass(frozen=True, slots=True)
class Holder:
    """One (engine, group, medium) that holds a block, and how many copies of it."""

    engine: EngineId
    group: int
    medium: Medium
    copies: int
    doubtful: bool = False
