"""What a lookup answers, as both services speak of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
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


class PlainMatches(NamedTuple):
    """Engines that serve from their GPU, with nothing of it in doubt and nothing expected beyond it: nearly all.

    Element i of each column is of one engine. Columns, because an answer about a large fleet is made, sent and read
    several times as fast as with an `EngineMatch` for each.
    """

    engines: Sequence[EngineId] = ()
    blocks: Sequence[int] = ()
    exact: Sequence[bool] = ()

    def at(self, place: int) -> EngineMatch:
        blocks = self.blocks[place]
        return EngineMatch(self.engines[place], blocks, {Medium.GPU: blocks}, self.exact[place], 0, blocks)

    def without(self, these: Sequence[bool]) -> PlainMatches:
        kept = [not is_one for is_one in these]
        return PlainMatches(
            list(compress(self.engines, kept)), list(compress(self.blocks, kept)), list(compress(self.exact, kept))
        )


_NONE = PlainMatches()


@dataclass(frozen=True, slots=True, eq=False)
class MatchAnswer:
    """The engines that hold something or are expected to: `plain` ones, and all others `listed`.

    `unknown`: those of whose cache nothing can be said.
    """

    listed: tuple[EngineMatch, ...] = ()
    unknown: tuple[EngineId, ...] = ()
    plain: PlainMatches = _NONE

    @classmethod
    def joined(cls, answers: Sequence[MatchAnswer], unknown: tuple[EngineId, ...]) -> MatchAnswer:
        """Of engines that no two of them have in common."""
        if len(answers) == 1:
            return cls(answers[0].listed, unknown, answers[0].plain)
        columns = zip(*(answer.plain for answer in answers), strict=True)
        plain = PlainMatches(*(tuple(chain.from_iterable(column)) for column in columns))
        return cls(tuple(chain.from_iterable(answer.listed for answer in answers)), unknown, plain)

    @property
    def matches(self) -> tuple[EngineMatch, ...]:
        """All of them, made when asked for."""
        return (*map(self.plain.at, range(len(self.plain.engines))), *self.listed)

    @property
    def found(self) -> bool:
        """Whether any engine holds something or is expected to."""
        return bool(self.plain.engines or self.listed)

    def blocks(self) -> dict[EngineId, int]:
        """How many leading blocks each would serve."""
        plain = dict(zip(self.plain.engines, self.plain.blocks, strict=True))
        return plain | {match.engine: match.blocks for match in self.listed} if self.listed else plain

    def among(self, engines: Collection[EngineId]) -> MatchAnswer:
        """Of these engines alone; with none given, of all."""
        if not engines:
            return self
        wanted = frozenset(engines)
        return MatchAnswer(
            tuple(match for match in self.matches if match.engine in wanted),
            tuple(engine for engine in self.unknown if engine in wanted),
        )

    def expecting(self, blocks: Mapping[EngineId, int]) -> MatchAnswer:
        """With so many blocks expected of these of its engines, where that is more than they hold."""
        plain = self.plain
        more = [blocks.get(engine, 0) > held for engine, held in zip(plain.engines, plain.blocks, strict=True)]
        listed = [*(plain.at(place) for place, is_more in enumerate(more) if is_more), *self.listed]
        return MatchAnswer(
            tuple(
                match._replace(expected=expected) if (expected := blocks.get(match.engine, 0)) > match.blocks else match
                for match in listed
            ),
            self.unknown,
            plain.without(more) if any(more) else plain,
        )

    def __eq__(self, other: object) -> bool:
        """Whichever of the two ways a match is written."""
        if not isinstance(other, MatchAnswer):
            return NotImplemented
        return self.matches == other.matches and self.unknown == other.unknown

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Holder:
    """One (engine, group, medium) that holds a block, and how many copies of it."""

    engine: EngineId
    group: int
    medium: Medium
    copies: int
    doubtful: bool = False
