"""Lookups are counted by what came of them, and the index answers as if nobody counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pytest

from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.adapters.measured import MeasuredIndex
from kvatlas_indexer.adapters.metrics import COUNTED, counted_as
from kvatlas_indexer.core.contracts import IndexUnavailable, UnknownModel

HELD = MatchAnswer((EngineMatch(EngineId("e:1"), 3, {Medium.GPU: 3}, True),))


class Saying:
    def __init__(self, said: MatchAnswer | Exception) -> None:
        self.said = said

    async def match(
        self,
        model: str,
        prompts: Mapping[str, Sequence[int]],
        engines: Collection[EngineId] = (),
        *,
        estimate: bool = False,
    ) -> MatchAnswer:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (HELD, "found"),
        (MatchAnswer(), "nothing"),
        (UnknownModel("m"), "unknown-model"),
        (IndexUnavailable("down"), "unavailable"),
        (RuntimeError("a defect"), "defect"),
    ],
)
async def test_every_lookup_has_one_result(said: MatchAnswer | Exception, result: str) -> None:
    measured = MeasuredIndex(cast(Any, Saying(said)))
    if isinstance(said, Exception):
        with pytest.raises(type(said)):
            await measured.match("m", {})
    else:
        assert await measured.match("m", {}) is said
    assert measured.results == {result: 1}
    assert measured.durations.cumulative()[-1][1] == 1


@pytest.mark.parametrize(
    "outcome",
    [
        "batch",
        "duplicate",
        "event-stored",
        "cleared",
        "malformed",
        "removed-unknown",
        "replay",
        "replay-complete",
        "loss",
    ],
)
def test_what_an_engine_counts_has_the_labels_of_its_family(outcome: str) -> None:
    family, labels = counted_as(outcome)
    assert len(labels) == len(COUNTED[family][1])
