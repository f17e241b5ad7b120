"""How an engine changes hands: its owner dies at any moment, its partitions have come differently far, and its
successor ends where one that never died would be."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.fleet import Health, Sync
from kvatlas_common.words import Medium
from tests.unit.indexer.core.published import SIZE, UNKNOWABLE, Publisher, profile
from tests.unit.indexer.core.shared_store import ENGINE, Owner, Store, message

GPU, CPU = Medium.GPU, Medium.CPU
PUBLISHER = Publisher(profile())
PROMPTS = [list(range(100 * n, 100 * n + SIZE * 4)) for n in range(4)]
HASHES = [PUBLISHER.hashes(prompt) for prompt in PROMPTS]


def stored(prompt: int = 0, **also: Any) -> dict[str, Any]:
    return PUBLISHER.stored(PROMPTS[prompt], **also)


def removed(*hashes: int, medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, "group_idx": 0}


CLEARED = {"type": "AllBlocksCleared"}


def owner(partitions: int = 1, **options: Any) -> tuple[Owner, Store]:
    store = Store(partitions, count(1))
    made = Owner(store, **options)
    made.begin([], 1.0)
    return made, store


def test_what_is_known_of_an_engine_goes_with_it() -> None:
    first, store = owner(replay=False)
    log = [message(0, 2.0, stored()), message(1, 3.0, removed(*HASHES[0][:1]))]
    for frames in log:
        first.hear(frames, [], 4.0)
    first.flush(0)
    second = Owner(store, replay=False)
    assert second.take_over([], 5.0)
    assert second.table() == first.table()
    before, after = first.view, second.view
    assert (after.profile, after.profile_verified, after.block_size) == (before.profile, True, SIZE)
    assert (after.models, after.health) == (frozenset({"m"}), Health.READY)
    assert second.record().places == first.record().places
    # It was out of reach in between, and nobody can say what it published: the next message does.
    assert after.sync is Sync.INEXACT
    second.hear(message(2, 6.0, stored(1)), [], 6.0)
    assert second.view.sync is Sync.EXACT


def test_doubt_goes_with_it_and_so_does_the_reason() -> None:
    first, store = owner(replay=False)
    first.hear(message(0, 2.0, stored()), [], 2.0)
    first.hear(message(5, 3.0, stored(1)), [], 3.0)
    assert first.view.sync is Sync.INEXACT
    first.flush(0)
    second = Owner(store, replay=False)
    assert second.take_over([], 4.0)
    second.hear(message(6, 5.0, stored(2)), [], 5.0)
    assert (second.view.sync, second.view.inexact_reason) == (Sync.INEXACT, first.view.inexact_reason)
    doubtful = {h.engine for key in HASHES[0] for h in second.index.residency.holders(key) if h.doubtful}
    assert doubtful == {ENGINE}
    assert not any(h.doubtful for key in HASHES[1] for h in second.index.residency.holders(key))


@pytest.mark.parametrize(
    "why", ["a partition was wiped", "a partition is of an earlier epoch", "names were recomputed"]
)
def test_what_cannot_be_trusted_is_begun_anew(why: str) -> None:
    first, store = owner(partitions=2, seed=UNKNOWABLE if why == "names were recomputed" else "42")
    used = Publisher(profile(seed=UNKNOWABLE + "?")) if why == "names were recomputed" else PUBLISHER
    log = [message(0, 2.0, used.stored(PROMPTS[0]))]
    first.hear(log[0], log, 2.0)
    first.flush(0, 1)
    if why == "a partition was wiped":
        store.reached[1] = None
    elif why == "a partition is of an earlier epoch":
        first.known.engine.begins_anew_elsewhere()
        first.flush(0)
    second = Owner(store)
    epoch = first.known.engine.epoch
    assert not second.take_over(log, 3.0)
    assert second.known.engine.epoch > epoch
    assert second.table() == first.table(), "it can be asked for all of it"
    assert second.view.sync is Sync.EXACT


prompts, blocks = st.integers(0, 3), st.integers(1, 4)
messages = st.one_of(
    st.tuples(st.just("store"), prompts, blocks),
    st.tuples(st.just("store"), prompts, blocks),
    st.tuples(st.just("remove"), prompts, blocks),
    st.tuples(st.just("clear"), st.just(0), st.just(0)),
)
flushes = st.tuples(st.just("flush"), st.sampled_from([7, 1, 2, 3, 4, 5, 6]), st.just(0))
lives = st.tuples(
    st.lists(messages, max_size=6),
    st.just([("flush", 7, 0)]),
    st.lists(st.one_of(messages, flushes), min_size=2, max_size=10),
    st.just([("die", 0, 0)]),
)
steps = st.lists(lives, min_size=1, max_size=4).map(lambda found: [s for life in found for part in life for s in part])


@settings(max_examples=80, deadline=None)
@given(partitions=st.integers(1, 3), script=steps)
def test_owners_may_die_at_any_time(partitions: int, script: list[tuple[str, int, int]]) -> None:
    """Against one that sees all and lives."""
    witness, _ = owner()
    now, log = 1.0, list[list[bytes]]()
    store = Store(partitions, count(1))
    present = Owner(store)
    present.begin([], now)
    for what, which, length in script:
        now += 1.0
        if what == "flush":
            present.flush(*(p for p in range(partitions) if which & 1 << p))
        elif what == "die":
            present = Owner(store)
            if store.record:
                present.take_over(log, now)
            else:
                present.begin(log, now)
            assert present.view.sync is Sync.EXACT
        else:
            hashes = HASHES[which][:length]
            held = [h for h in hashes if witness.index.residency.holders(h)]
            events = {
                "store": [PUBLISHER.stored(PROMPTS[which][: length * SIZE])],
                "remove": [removed(*held)] if held else [],
                "clear": [CLEARED],
            }
            log.append(message(len(log), now, *events[what]))
            for each in (witness, present):
                each.hear(log[-1], log, now)
        assert present.table() == witness.table()
