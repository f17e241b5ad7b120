"""One behaviour of the index, wherever residency is kept: in memory, on one Valkey, on a cluster of three.

Engines publish, and an index takes their messages in. Embedded, that index answers. Shared, it is an owner that writes
to the store, and who answers is another process's reader that has nothing but the store.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.fleet import Adapter, Health, Sync
from kvatlas_common.matching import EngineMatch, Holder, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.adapters.front import Front
from kvatlas_indexer.adapters.local_index import LocalIndex
from kvatlas_indexer.adapters.publisher import Publisher as StorePublisher
from kvatlas_indexer.adapters.redis_store import BLOCK_TTL_S, RedisStore
from kvatlas_indexer.adapters.shared_index import SharedIndex
from kvatlas_indexer.core.contracts import IndexUnavailable, Lookups, UnknownModel
from kvatlas_indexer.core.engine import Bounds
from kvatlas_indexer.core.index import Rules
from kvatlas_indexer.core.loads import LoadBoard
from kvatlas_indexer.core.routing import Routing
from kvatlas_loadtest.valkey import Valkey
from tests.integration.redis_kit import fresh_prefix, opened
from tests.unit.indexer.core.published import SIZE, UNKNOWABLE, Publisher, profile
from tests.unit.indexer.core.world import E1, E2, LATER, OLD, PROMPT, World, spec

CLEARED = {"type": "AllBlocksCleared"}
MANY = 20_000
BYTES_PER_CLEAR = 8_000
"""What a clear may send to the store: the engine's record, and looks at where it stands. Its blocks would be more."""
GPU, CPU = Medium.GPU, Medium.CPU


class Deployment:
    """`world`: what the engines say, and the index that hears them. `answers`: who is asked."""

    def __init__(self, world: World, answers: Front, owner: Owner | None = None) -> None:
        self.world = world
        self.answers = answers
        self.owner = owner

    async def settled(self) -> Front:
        """Who answers, once all that was said can be known to it."""
        if self.owner is not None:
            await self.owner.write(self.world)
            with contextlib.suppress(UnknownModel, IndexUnavailable):
                await self.answers.holders("m", [0])  # a lookup brings the version of the fleet along
            assert self.answers.fleet() == self.world.index.fleet()
        return self.answers

    async def matches(
        self, tokens: Sequence[int] = PROMPT, *used: HashProfile, model: str = "m", engines: Collection[EngineId] = ()
    ) -> MatchAnswer:
        keys = {p.name: prompt_keys(p, [*tokens, 0]).tolist() for p in used or (LATER,)}
        return await (await self.settled()).match(model, keys, engines)

    async def blocks(self, tokens: Sequence[int] = PROMPT, *used: HashProfile, **how: Any) -> dict[EngineId, int]:
        return {match.engine: match.blocks for match in (await self.matches(tokens, *used, **how)).matches}

    def bytes_to_store(self) -> int:
        return self.owner.bytes_to_store() if self.owner else 0


class Owner:
    """The shard that owns every engine."""

    def __init__(self, store: RedisStore, world: World, servers: Sequence[Valkey], prefix: str) -> None:
        self._store = store
        self._publisher = StorePublisher(world.index, store, clock=time.monotonic)
        self._owned: set[EngineId] = set()
        self.servers = servers
        self.prefix = prefix

    async def write(self, world: World) -> None:
        for engine in {known.id for known in world.index.known()} - self._owned:
            assert await self._store.raise_fence(engine, 1) is not None
            self._publisher.own(engine, 1)
            self._owned.add(engine)
        await self._publisher.flush_all()

    def bytes_to_store(self) -> int:
        total = 0
        for server in self.servers:
            with server.client() as client:
                total += client.info("stats")["total_net_input_bytes"]
        return total

    def written(self) -> list[tuple[Valkey, bytes]]:
        """All keys of this deployment, and where they are."""
        found: list[tuple[Valkey, bytes]] = []
        for server in self.servers:
            with server.client() as client:
                found += [(server, key) for key in client.scan_iter(match=self.prefix + "*", count=10_000)]
        return found


@asynccontextmanager
async def deployed(kind: str, request: pytest.FixtureRequest, rules: Rules | None = None) -> AsyncIterator[Deployment]:
    """Two engines are wanted and answer probes."""
    world = World(rules)
    world.wants(spec(E1), spec(E2))
    for engine in (E1, E2):
        world.facts(engine)
    if kind == "memory":
        yield Deployment(world, front(LocalIndex(world.index)))
        return
    servers = [request.getfixturevalue("single")] if kind == "single" else request.getfixturevalue("cluster")
    url = servers[0].url if kind == "single" else f"redis+cluster://{servers[0].address}"
    prefix = fresh_prefix()
    async with AsyncExitStack() as stack:
        ours, theirs = [await stack.enter_async_context(opened(url, prefix)) for _ in range(2)]
        owner = Owner(RedisStore(ours), world, servers, prefix)
        shared = SharedIndex(RedisStore(theirs), on_change=lambda: None, on_emptied=lambda _: None)
        yield Deployment(world, front(shared), owner)


def front(lookups: Lookups) -> Front:
    routing = Routing(estimate_ttl_s=600)
    return Front(lookups, routing, LoadBoard(routing.in_flight), time.monotonic)


@pytest.fixture(params=["memory", "single", "cluster"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def it(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Deployment]:
    async with deployed(kind, request) as made:
        yield made


# -- matching ----------------------------------------------------------------------------------------------------------


async def test_a_match_says_how_many_where_and_how_sure(it: Deployment) -> None:
    it.world.store(E1, LATER)
    it.world.store(E2, LATER, PROMPT[: 2 * SIZE], seq=7)
    answer = await it.matches()
    assert sorted(answer.matches, key=lambda match: str(match.engine)) == [
        EngineMatch(E1, 5, {GPU: 5}, exact=True, expected=5),
        EngineMatch(E2, 2, {GPU: 2}, exact=False, expected=2),
    ]
    assert answer.unknown == ()
    assert await it.blocks(engines=[E2]) == {E2: 2}
    assert await it.blocks([*PROMPT[:SIZE], *PROMPT]) == {E1: 1, E2: 1}  # what comes after a block nobody holds
    assert await it.blocks([9] * SIZE) == {}


async def test_long_prompts_are_matched_to_their_end(it: Deployment) -> None:
    tokens = list(range(1500 * SIZE))
    it.world.store(E1, LATER, tokens)
    it.world.store(E2, LATER, tokens[: 700 * SIZE])
    assert await it.blocks(tokens) == {E1: 1500, E2: 700}


async def test_media_are_told_apart_and_the_nearest_counts(it: Deployment) -> None:
    it.world.store(E1, LATER, PROMPT[: 2 * SIZE])
    it.world.store(E1, LATER, medium="CPU")
    (match,) = (await it.matches()).matches
    assert (match.blocks, match.media) == (5, {GPU: 2, CPU: 3})


async def test_groups_are_matched_by_their_rules(it: Deployment) -> None:
    full = Publisher(LATER).stored(PROMPT)
    window: dict[str, Any] = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 5, "group_idx": 1}
    it.world.say(E1, full | window | {"block_hashes": full["block_hashes"][3:4]}, full)
    assert await it.blocks() == {E1: 4}
    it.world.say(
        E1, {"type": "BlockRemoved", "block_hashes": full["block_hashes"][3:4], "medium": "GPU", "group_idx": 1}
    )
    assert await it.blocks() == {}


async def test_speculative_decoding_drops_the_last_block(it: Deployment) -> None:
    it.world.wants(spec(E1, speculative_drop_blocks=1), spec(E2))
    it.world.store(E1, LATER)
    assert await it.blocks() == {E1: 4}


async def test_ranks_are_engines_of_their_own(it: Deployment) -> None:
    it.world.wants(spec(E1, ranks=2), spec(E2))
    second = EngineId(E1.address, 1)
    it.world.store(second, LATER, PROMPT[: 3 * SIZE], rank=1)
    assert await it.blocks() == {second: 3}


# -- copies ------------------------------------------------------------------------------------------------------------


async def test_a_block_stored_twice_is_held_until_it_is_removed_twice(it: Deployment) -> None:
    keys = Publisher(LATER).hashes(PROMPT)
    removed = {"type": "BlockRemoved", "block_hashes": keys[:1], "medium": "GPU", "group_idx": 0}
    it.world.store(E1, LATER)
    it.world.store(E1, LATER)
    answers = await it.settled()
    assert await answers.holders("m", keys[:1]) == ((Holder(E1, 0, GPU, 2),),)
    it.world.say(E1, removed)
    assert await it.blocks() == {E1: 5}
    assert await answers.holders("m", [keys[0], 12345]) == ((Holder(E1, 0, GPU, 1),), ())
    it.world.say(E1, removed)
    assert await it.blocks() == {}
    assert await answers.holders("m", keys[:2]) == ((), (Holder(E1, 0, GPU, 2),))


async def test_every_holder_of_a_block_is_told(it: Deployment) -> None:
    it.world.store(E1, LATER)
    it.world.store(E1, LATER, medium="CPU")
    it.world.store(E2, LATER)
    (told,) = await (await it.settled()).holders("m", Publisher(LATER).hashes(PROMPT)[2:3])
    assert set(told) == {Holder(E1, 0, GPU, 1), Holder(E1, 0, CPU, 1), Holder(E2, 0, GPU, 1)}


# -- clears, deaths and restarts ---------------------------------------------------------------------------------------


async def test_a_clear_and_a_death_cost_nothing_however_much_was_held(it: Deployment) -> None:
    for engine in (E1, E2):
        it.world.store(engine, LATER)
        it.world.index.residency.store(engine, 0, GPU, range(MANY))
    assert await it.blocks() == {E1: 5, E2: 5}
    entries, sent = len(it.world.index.residency), it.bytes_to_store()
    it.world.say(E1, CLEARED)
    assert await it.blocks() == {E2: 5}
    it.world.facts(E2, Health.DOWN)
    assert await it.blocks() == {}
    assert len(it.world.index.residency) == entries  # nobody has walked them: that is the sweep's work
    assert it.bytes_to_store() - sent < 2 * BYTES_PER_CLEAR
    it.world.store(E1, LATER, PROMPT[:SIZE])
    assert await it.blocks() == {E1: 1}


async def test_a_clear_spares_other_media(it: Deployment) -> None:
    it.world.store(E1, LATER)
    it.world.store(E1, LATER, PROMPT[: 2 * SIZE], medium="CPU")
    it.world.say(E1, CLEARED)
    (match,) = (await it.matches()).matches
    assert (match.blocks, match.media, match.doubtful, match.exact) == (2, {CPU: 2}, 2, False)


async def test_a_restart_forgets_and_a_name_is_used_again_safely(it: Deployment) -> None:
    it.world.store(E1, LATER)
    assert await it.blocks() == {E1: 5}
    it.world.now += 60
    it.world.store(E1, LATER, PROMPT[: 2 * SIZE], seq=0)
    assert await it.blocks() == {E1: 2}
    it.world.wants(spec(E2))  # it is gone for good, and later somebody else has its address
    assert E1 not in (await it.settled()).fleet().engines
    it.world.wants(spec(E1), spec(E2))
    it.world.facts(E1)
    it.world.store(E1, LATER, PROMPT[:SIZE], seq=0)
    assert await it.blocks() == {E1: 1}


# -- doubt -------------------------------------------------------------------------------------------------------------


async def test_a_loss_leaves_doubtful_entries_that_count_until_they_age_out(
    kind: str, request: pytest.FixtureRequest
) -> None:
    async with deployed(kind, request, Rules(bounds=Bounds(doubt_ttl_s=100))) as it:
        it.world.store(E1, LATER, PROMPT[: 3 * SIZE])
        it.world.store(E1, LATER, since=3, seq=5)
        (match,) = (await it.matches()).matches
        assert (match.blocks, match.doubtful, match.exact) == (5, 3, False)
        keys = Publisher(LATER).hashes(PROMPT)
        answers = await it.settled()
        assert await answers.holders("m", keys[:1]) == ((Holder(E1, 0, GPU, 1, doubtful=True),),)
        assert answers.fleet().engines[E1].sync is Sync.INEXACT
        it.world.store(E1, LATER, PROMPT[:SIZE])  # a store settles it
        assert (await it.matches()).matches[0].doubtful == 2
        it.world.facts(E1)
        it.world.passes(101)
        it.world.facts(E1)
        assert await it.blocks() == {E1: 1}


# -- unknown is not empty ----------------------------------------------------------------------------------------------


async def test_unknown_empty_and_unserved_are_three_answers(it: Deployment) -> None:
    it.world.store(E1, LATER, PROMPT[:SIZE])
    answer = await it.matches([9] * SIZE)
    assert (answer.matches, answer.unknown) == ((), (E2,))  # one holds nothing of it, the other was never heard
    assert (await it.matches(engines=[E1])).unknown == ()
    it.world.store(E2, LATER, [9] * SIZE)
    assert (await it.matches()).unknown == ()
    answers = await it.settled()
    with pytest.raises(UnknownModel):
        await answers.match("other", {LATER.name: [1]})
    with pytest.raises(UnknownModel):
        await answers.holders("other", [1])
    it.world.facts(E1, Health.DOWN)
    it.world.facts(E2, Health.DOWN)
    assert await it.matches() == MatchAnswer()  # served, by engines that are down


async def test_a_store_that_has_lost_everything_is_not_an_index_that_holds_nothing(
    kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "memory":
        pytest.skip("it is lost with its process only")
    async with deployed(kind, request) as it:
        it.world.store(E1, LATER)
        assert await it.blocks() == {E1: 5}
        assert it.owner is not None
        for server, key in it.owner.written():
            with server.client() as client:
                client.delete(key)
        with pytest.raises(IndexUnavailable):
            await it.answers.match("m", {LATER.name: Publisher(LATER).hashes(PROMPT)})


# -- several models and profiles ---------------------------------------------------------------------------------------


async def test_each_engine_is_matched_by_its_own_profile(it: Deployment) -> None:
    it.world.store(E1, OLD)
    it.world.store(E2, LATER)
    assert await it.blocks(PROMPT, OLD) == {E1: 5}
    assert (await it.matches(PROMPT, OLD)).unknown == (E2,)  # it was not asked in its own words
    both = await it.matches(PROMPT, OLD, LATER)
    assert {m.engine: m.blocks for m in both.matches} == {E1: 5, E2: 5}
    assert both.unknown == ()


async def test_hashes_that_cannot_be_reproduced_are_matched_by_ours(it: Deployment) -> None:
    secret = profile(seed=UNKNOWABLE)
    it.world.store(E1, secret)
    named = (await it.settled()).fleet().engines[E1].profile
    assert named is not None
    assert await it.blocks(PROMPT, HashProfile.parse(named)) == {E1: 5}
    it.world.say(E1, {"type": "BlockRemoved", "block_hashes": Publisher(secret).hashes(PROMPT)[3:], "medium": "GPU"})
    assert await it.blocks(PROMPT, HashProfile.parse(named)) == {E1: 3}


async def test_models_and_adapters_are_kept_apart(it: Deployment) -> None:
    facts = EngineFacts(E1, Health.READY, frozenset({"m", "sql"}), (Adapter("sql", "/adapters/sql", 1),))
    it.world.index.on_facts(facts, it.world.now)
    it.world.index.on_facts(EngineFacts(E2, Health.READY, frozenset({"other"})), it.world.now)
    for engine in (E1, E2):
        it.world.store(engine, LATER)
    assert await it.blocks() == await it.blocks(model="sql") == {E1: 5}
    assert await it.blocks(model="other") == {E2: 5}
    (held,) = await it.answers.holders("other", Publisher(LATER).hashes(PROMPT)[:1])
    assert [holder.engine for holder in held] == [E2]


# -- the fleet, and what is left behind --------------------------------------------------------------------------------


async def test_whoever_watches_is_told_the_fleet_and_what_changes(it: Deployment) -> None:
    it.world.store(E1, LATER)
    answers = await it.settled()
    watch = answers.watch()
    assert isinstance(watch, AsyncGenerator)
    async with contextlib.aclosing(watch) as watching:
        first = await anext(watching)
        assert first.snapshot
        assert set(first.changed) == set(it.world.index.fleet().engines.values())
        it.world.wants(spec(E1))
        await it.settled()
        answers.wake()
        second = await anext(watching)
        assert (second.snapshot, second.removed) == (False, (E2,))


async def test_what_a_crashed_deployment_leaves_behind_expires(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "memory":
        pytest.skip("it leaves nothing behind")
    async with deployed(kind, request) as it:
        it.world.store(E1, LATER)
        await it.settled()
        assert it.owner is not None
        written = [(server, key, key.rpartition(b"}")[2]) for server, key in it.owner.written()]
        of_blocks = [(server, key) for server, key, name in written if name[:1] in {b"b", b"s"} and name != b"slot"]
        assert len(of_blocks) > len(PROMPT) // SIZE
        for server, key in of_blocks:
            with server.client() as client:
                assert 0 < client.ttl(key) < 2 * BLOCK_TTL_S, key
