"""What counts as true of a cache that changes while it is looked at, and how an index is held against it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_loadtest.chaos.truth import Difference, Gone, Kept, Look, Table, Verdict, compare, settled

tables = st.dictionaries(st.integers(0, 12), st.integers(1, 3))


@given(st.lists(tables, min_size=1, max_size=4))
def test_only_what_all_tables_say_alike_is_settled(several: list[Table]) -> None:
    found = settled(several, range(14))
    for key in range(14):
        said = {table.get(key, 0) for table in several}
        assert (key in found) == (len(said) == 1)
        assert found.get(key, 0) in said or key not in found


@given(tables, tables)
def test_an_index_is_right_exactly_when_it_says_the_table(table: Table, said: Table) -> None:
    difference = compare({key: table.get(key, 0) for key in range(13)}, said)
    assert bool(difference) == (table != said)
    assert difference.missing == len(table.keys() - said.keys())
    assert difference.left == len(said.keys() - table.keys())
    assert difference.miscounted == sum(table[k] != said[k] for k in table.keys() & said.keys())


def test_what_is_not_settled_is_not_held_against_the_index() -> None:
    true = settled([{1: 1, 2: 1}, {1: 1, 2: 2}], [1, 2, 3])
    assert true == {1: 1, 3: 0}
    assert not compare(true, {1: 1, 2: 5})


def test_a_verdict_is_exact_only_where_the_index_says_so_and_it_is_so() -> None:
    right = Verdict("s", "e", "exact", matched=4, held=4)
    assert right.exact
    assert not Verdict("s", "e", "exact", matched=3, held=4).right, "a lookup that finds too little is wrong"
    liar = Verdict("s", "e", "exact", difference=Difference(10, missing=1))
    assert not liar.exact
    assert not liar.honest
    modest = Verdict("s", "e", "inexact", "messages lost", Difference(10, missing=1))
    assert modest.honest
    assert not modest.exact
    assert "inexact (messages lost), 1 missing of 10 blocks" in str(modest)


def test_a_look_needs_every_shard_and_every_engine() -> None:
    right = Verdict("s", "e", "exact")
    assert Look(0.0, (right,)).exact
    assert not Look(0.0, (right,), silent=("shard-1: TimeoutError()",)).honest
    assert not Look(0.0).exact, "nobody was asked"
    worse = Look(0.0, (right, Verdict("t", "e", "syncing"), Verdict("t", "f", "inexact")))
    assert worse.sync() == {"e": "syncing", "f": "inexact"}
    assert len(worse.problems()) == 2


def test_blocks_that_went_are_remembered_until_somebody_holds_them_again() -> None:
    gone = Gone()
    gone.saw([{1: 1, 2: 1}, {3: 1}])
    assert not gone.keys
    gone.saw([{1: 1}, {4: 1}])
    assert list(gone.keys) == [2, 3]
    gone.saw([{1: 1}, {2: 1}])
    assert list(gone.keys) == [3, 4]


def test_what_went_is_remembered_within_bounds() -> None:
    gone = Gone()
    gone.saw([dict.fromkeys(range(5000), 1)])
    gone.saw([])
    assert len(gone.keys) == 1000
    assert 4999 in gone.keys


def test_kept_are_blocks_known_before_and_held_throughout() -> None:
    said = {"a": {"e": {1: 1, 2: 1, 3: 1}}, "b": {"e": {1: 1, 2: 1}}}
    kept = Kept.since({"e": {1: 1, 2: 2, 3: 3, 4: 4}, "f": {9: 1}}, said)
    assert kept.blocks == {"e": {1: 1, 2: 2}, "f": {}}, "3 and 4 were not known to every shard"
    kept.saw({"e": {1: 1, 2: 2}, "g": {1: 1}})
    kept.saw({})  # nobody answered: that ends nothing
    assert kept.share_said({"a": {"e": {1: 1, 2: 1}}, "b": {"e": {1: 1}}}) == 0.5, "the shard that says least counts"
    kept.saw({"e": {1: 7, 2: 2}})  # 1 was evicted in between: whoever missed its return has wiped nothing
    assert kept.share_said({"a": {"e": {2: 1}}}) == 1.0
    kept.forget("e")
    assert math.isnan(kept.share_said({"a": {}}))
