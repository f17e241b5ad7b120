"""Lookups from records and block values alone, against the residency they were made from."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvatlas_common.fleet import Health, Sync
from kvatlas_common.matching import Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.match import EngineGroups, GroupRule, Plan
from kvatlas_indexer.core.projection import RECORD, Projection
from kvatlas_indexer.core.records import PlaceRecord, RuleRecord
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.shared import SharedFleet
from tests.unit.indexer.core.test_records import PLAIN

A, B = EngineId("10.0.0.1:8000"), EngineId("10.0.0.2:8000", 1)
GPU, CPU = Medium.GPU, Medium.CPU
KEYS = range(12)
RULES = {0: GroupRule.of(None, None), 1: GroupRule.of("sliding_window", 33)}
GOOD = replace(PLAIN, sync=Sync.EXACT, places=[], rules=[], drop_last_blocks=0)


def value(*holders: tuple[int, int]) -> bytes:
    """Of (slot number, copies)."""
    return b"".join(RECORD.pack(*holder) for holder in holders)


def test_holders_by_slot_number_and_those_nobody_knows_are_dead() -> None:
    fleet = SharedFleet([replace(GOOD, engine=str(A), places=[PlaceRecord(0, "gpu", 7, [3], [1.0])])])
    assert fleet.holders("m", value((7, 2), (9, 1))) == (Holder(A, 0, GPU, 2),)
    assert fleet.holders("m", value((3, 1))) == (Holder(A, 0, GPU, 1, doubtful=True),)
    assert fleet.holders("m", None) == ()
    assert fleet.masks([value((9, 1)), None]) == [0, 0]
    assert fleet.live_slots == {3, 7}


def test_engines_that_are_down_or_serve_something_else_are_not_found() -> None:
    down = replace(GOOD, engine=str(A), health=Health.DOWN, places=[PlaceRecord(0, "gpu", 1)])
    other = replace(GOOD, engine=str(B), models=["other"], places=[PlaceRecord(0, "gpu", 2)])
    fleet = SharedFleet([down, other])
    assert fleet.holders("m", value((1, 1), (2, 1))) == ()
    assert fleet.plan("m") == ({}, ())
    with pytest.raises(UnknownModel):
        fleet.plan("nobody's")


def test_an_engine_of_which_nothing_is_known_is_not_empty() -> None:
    silent = replace(GOOD, engine=str(A), heard=False)
    unproven = replace(GOOD, engine=str(B), profile=None)
    plans, unknown = SharedFleet([silent, unproven]).plan("m")
    assert (dict(plans), unknown) == ({}, (A, B))


keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=8)
steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "remove", "doubt", "clear"]),
        st.sampled_from([A, B]),
        st.sampled_from([0, 0, 1]),
        st.sampled_from([GPU, GPU, CPU]),
        keys,
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_as_the_residency_itself_would_answer(script: list[tuple[str, EngineId, int, Medium, list[int]]]) -> None:
    residency = Residency()
    projection = Projection(residency, partitions=1, new_number=count(1).__next__)
    for what, engine, group, medium, some in script:
        if what == "store":
            residency.store(engine, group, medium, some)
        elif what == "remove":
            residency.remove(engine, group, medium, some)
        elif what == "doubt":
            residency.doubt(engine, 1.0)
        else:
            residency.clear(engine, [medium])
    values: dict[int, bytes] = dict.fromkeys(KEYS, b"")
    for engine in (A, B):
        for write in projection.take(engine):
            for slot in write.slots:
                for key, copies in zip(slot.keys, slot.copies, strict=True):
                    values[key] += value((slot.number, copies)) if copies else b""
    number, rules = projection.number, [RuleRecord(g, r.name, r.window) for g, r in RULES.items()]
    fleet = SharedFleet(
        replace(
            GOOD,
            engine=str(engine),
            rules=rules,
            places=[
                PlaceRecord(group, medium, number(p.live), [*map(number, p.doubts)], [1.0] * len(p.doubts))
                for (group, medium), p in residency.places(engine).items()
            ],
        )
        for engine in (A, B)
    )
    plan = Plan([EngineGroups(e, True, residency.places(e), RULES, 16) for e in (A, B)])
    (shared,) = fleet.plan("m")[0].values()
    found = [values[key] or None for key in KEYS]
    by_engine = {match.engine: match for match in plan.match(residency.masks(KEYS)).matches}
    assert {match.engine: match for match in shared.match(fleet.masks(found)).matches} == by_engine
    for key in KEYS:
        assert set(fleet.holders("m", values[key])) == set(residency.holders(key))
