"""Which engines a shard should own, as a table of cases, and a fleet of shards that settle by these rules alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_indexer.core import ownership as ownership_module
from kvatlas_indexer.core.ownership import (
    FORCE_INTERVAL_S,
    HEARD_FRESH_S,
    ORPHANED_S,
    Lease,
    Move,
    Ownership,
    winner,
)

E = "10.0.0.1:8000"
LIVE = ("a", "b", "c")
WINS = winner(E, LIVE)
LOSES = next(shard for shard in LIVE if shard != WINS)
assert WINS is not None
MINE, THEIRS = "mine", "theirs"


@pytest.mark.parametrize(
    ("shard", "dialled", "heard", "lease", "expected"),
    [
        (WINS, True, False, None, Move.ACQUIRE),
        (LOSES, True, False, None, None),
        (WINS, True, False, MINE, None),
        (LOSES, True, False, MINE, Move.RELEASE),
        (WINS, True, False, THEIRS, None),  # its owner lets go by itself
        (WINS, False, False, None, Move.ACQUIRE),  # nobody hears it yet: somebody has to probe it
        (LOSES, False, True, None, Move.ACQUIRE),
        (LOSES, False, True, THEIRS, Move.FORCE),
        (LOSES, False, True, MINE, None),
        (LOSES, False, False, MINE, None),  # silent for now, and still connected here
        (LOSES, None, True, None, Move.ACQUIRE),  # in no list: it speaks for itself
        (LOSES, None, True, THEIRS, Move.FORCE),
        (WINS, None, False, MINE, Move.RELEASE),  # discovery has dropped it
        (WINS, None, False, None, None),
    ],
)
def test_one_engine(shard: str, dialled: bool | None, heard: bool, lease: str | None, expected: Move | None) -> None:
    ownership = Ownership(shard)
    if heard:
        ownership.heard(E, 99.0)
    owner = {MINE: shard, THEIRS: "somebody else"}.get(lease or "")
    moves = ownership.moves(
        wanted={} if dialled is None else {E: dialled},
        leases={E: Lease(owner, 7)} if owner else {},
        live=LIVE,
        now=100.0,
    )
    assert moves.get(E) is expected


def test_an_engine_in_no_list_is_nobodys_after_a_while_without_an_owner() -> None:
    ownership = Ownership("a")
    assert ownership.orphaned({E}, 0.0) == set()
    assert ownership.orphaned({E}, ORPHANED_S - 0.1) == set()
    assert ownership.orphaned({E}, ORPHANED_S) == {E}
    assert ownership.orphaned(set(), ORPHANED_S + 1) == set()  # somebody has taken it
    assert ownership.orphaned({E}, ORPHANED_S + 2) == set()


def test_names_heard_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership_module, "HEARD_MAX", 2)
    ownership = Ownership("a")
    for name in ("x", "y", "x", "z"):
        ownership.heard(name, 0.0)
    assert [ownership.hears(name, 0.0) for name in ("x", "y", "z")] == [True, False, True]


def test_an_engine_not_heard_for_a_while_is_not_taken_from_another_shard() -> None:
    ownership = Ownership("a")
    ownership.heard(E, 0.0)
    leases = {E: Lease("b", 1)}
    fresh = ownership.moves(wanted={}, leases=leases, live=LIVE, now=HEARD_FRESH_S - 0.1)
    stale = ownership.moves(wanted={}, leases=leases, live=LIVE, now=HEARD_FRESH_S)
    assert (fresh, stale) == ({E: Move.FORCE}, {})


def test_two_shards_that_both_hear_an_engine_do_not_take_it_from_each_other_all_the_time() -> None:
    one, two = Ownership("a"), Ownership("b")
    owner, changes = "a", 0
    for tenth in range(300):
        now = tenth / 10
        for name, ownership in (("a", one), ("b", two)):
            ownership.heard(E, now)
            if ownership.moves(wanted={}, leases={E: Lease(owner, changes)}, live=LIVE, now=now):
                owner, changes = name, changes + 1
    assert changes <= 30.0 / FORCE_INTERVAL_S * 2 + 1


addresses = st.lists(st.integers(0, 255).map(lambda n: f"10.0.0.{n}:8000"), min_size=1, max_size=30, unique=True)
names = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


@given(addresses, names, st.text("xyz", min_size=1, max_size=3))
def test_who_joins_takes_only_what_falls_to_it_and_who_leaves_leaves_the_rest_alone(
    engines: list[str], shards: list[str], joining: str
) -> None:
    for engine in engines:
        before, after = winner(engine, shards), winner(engine, [*shards, joining])
        assert after in (before, joining)


def test_engines_are_spread_evenly() -> None:
    shards = [f"shard-{n}" for n in range(4)]
    engines = [f"10.0.{n // 250}.{n % 250}:8000" for n in range(1000)]
    owned = [sum(winner(e, shards) == shard for e in engines) for shard in shards]
    assert min(owned) > 190
    assert max(owned) < 310


@settings(deadline=None)
@given(addresses, names, st.randoms(use_true_random=False))
def test_shards_that_come_and_go_settle_with_one_owner_each(engines: list[str], shards: list[str], rng: object) -> None:
    """Each looks at the leases and moves, one after the other, in any order: as heartbeats come."""
    wanted = dict.fromkeys(engines, True)
    leases: dict[str, Lease] = {e: Lease(rng.choice([*shards, "gone"]), 1) for e in engines}  # type: ignore[attr-defined]
    leases = {e: lease for e, lease in leases.items() if lease.shard != "gone"}  # those have run out
    made = {shard: Ownership(shard) for shard in shards}
    for now in range(2):
        for shard in rng.sample(shards, len(shards)):  # type: ignore[attr-defined]
            moves = made[shard].moves(wanted=wanted, leases=leases, live=shards, now=now)
            for engine, move in moves.items():
                if move is Move.RELEASE:
                    assert leases.pop(engine).shard == shard
                else:
                    assert engine not in leases
                    leases[engine] = Lease(shard, 1)
    assert {engine: lease.shard for engine, lease in leases.items()} == {e: winner(e, shards) for e in engines}
