"""What is wrong with the engines of this shard, by the look of everything that is known of them.

Nothing is remembered here but since when a stream is not connected: each look says all there is to say, and what a
look no longer finds is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvatlas_common.engines.facts import EngineFacts
from kvatlas_common.findings import Finding
from kvatlas_common.findings.engine import down, self_findings, version_of
from kvatlas_common.findings.hashing import Crowd, Hashing, hash_findings, hashing_of
from kvatlas_common.fleet import Fleet, Health, Sync
from kvatlas_common.words import EngineId
from kvatlas_indexer.core import advice
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.differences import REPEATED, Repetitions
from kvatlas_indexer.core.index import KvIndex
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.naming import Mode
from kvatlas_indexer.core.silence import Silence

CONNECTING_S = 3.0
"""A stream that is not connected is connecting for so long."""

Findings = list[tuple[EngineId | str, Finding]]


class Diagnosis:
    def __init__(self, index: KvIndex, accuracy: Accuracy, repetitions: Repetitions) -> None:
        self.silence = Silence()
        self._index = index
        self._accuracy = accuracy
        self._repetitions = repetitions
        self._unconnected: dict[EngineId, float] = {}

    def look(self, fleet: Fleet, now: float) -> Iterator[Findings]:
        """Engine by engine, so that whoever looks can do other things in between. `fleet`: all engines of all shards.

        `now` as the index has it.
        """
        known = {one.id: one for one in self._index.known()}
        self.silence.keep_only(set(known))
        self._unconnected = {e: self._unconnected.get(e, now) for e, one in known.items() if not one.engine.connected}
        yield [] if fleet.engines else [("", advice.no_engines())]
        ranks = Counter(engine.address for engine in known)
        reported = self._reported(set(known))
        crowd = _crowd(fleet, self._index.rules.expected.hashing)
        for engine, one in known.items():
            yield [(engine, finding) for finding in self._of(one, ranks[engine.address], crowd, now)]
        yield reported

    def _reported(self, known: set[EngineId]) -> Findings:
        """What routers' reports have shown, again and again."""
        found: Findings = [(engine, finding) for engine, finding in self._repetitions.current() if engine in known]
        for engine, count in self._accuracy.unreported.items():
            if count >= REPEATED and engine in known:
                found.append((engine, advice.unreported(count)))
        return found

    def _of(self, known: Known, ranks: int, crowd: Crowd, now: float) -> Iterator[Finding]:
        facts = known.facts or EngineFacts(known.id)
        if known.down_since is not None:
            yield down(facts.error or "nothing has been heard of it for too long")
            return
        if known.id.rank == 0:
            yield from self_findings(facts, ranks=max(ranks, known.spec.ranks if known.spec else 1))
        if facts.health is Health.DOWN:
            return
        yield from self._of_events(known, now)
        yield from self._of_hashing(known, facts, crowd)
        yield from _of_exactness(known)

    def _of_events(self, known: Known, now: float) -> Iterator[Finding]:
        engine, dialled = known.engine, _events_endpoint(known)
        silent = self.silence.of(known.id, engine.heard_at, engine.naming.block_size or _block_size(known), now)
        since = self._unconnected.get(known.id)
        if dialled is not None and since is not None:
            if now - since >= CONNECTING_S:
                yield advice.events_unreachable(dialled)
        elif silent is not None:
            yield advice.no_events(known.id, _model(known), silent, dialled, heard=engine.heard_at is not None)
        elif engine.sync is Sync.UNKNOWN and engine.heard_at is None:
            yield advice.not_heard_yet(known.id, _model(known), dialled)
        if not engine.stream.can_replay:
            if dialled is not None or engine.heard_at is not None:
                yield advice.replay_absent(known.id, dialled)
        elif engine.replay_failed and known.spec is not None:
            endpoint = known.spec.replay_endpoint(known.id.rank)
            yield advice.replay_unreachable(str(endpoint), engine.replay_failed)

    def _of_hashing(self, known: Known, facts: EngineFacts, crowd: Crowd) -> list[Finding]:
        naming = known.engine.naming
        if not self._index.rules.may_reproduce:
            return []
        does = Hashing(block_size=naming.block_size)
        if naming.verified and naming.profile is not None:
            does = Hashing.of(naming.profile)
        algorithm = facts.cache.prefix_caching_hash_algo if facts.cache else None
        does = does.or_else(Hashing(algorithm, _block_size(known)))
        peers, alike = crowd.peers(_model(known), str(known.id), does)
        return hash_findings(
            does,
            configured=self._index.rules.expected.hashing,
            peers=peers,
            alike=alike,
            reproducible=naming.mode is Mode.OWN,
            version=version_of(facts.version),
        )


def _of_exactness(known: Known) -> Iterator[Finding]:
    engine = known.engine
    sync, reason = engine.status
    if sync is not Sync.INEXACT or not engine.connected:
        return
    if engine.odd is not None and reason == engine.odd.wrong:
        yield engine.odd
    else:
        yield advice.inexact(reason, can_replay=engine.stream.can_replay)


def _crowd(fleet: Fleet, configured: Hashing) -> Crowd:
    crowd = Crowd(configured)
    for view in fleet.engines.values():
        if view.profile_verified and view.profile is not None and view.health is not Health.DOWN:
            adapters = {adapter.name for adapter in view.adapters}
            crowd.add(min(view.models - adapters, default=""), str(view.id), hashing_of(view.profile))
    return crowd


def _model(known: Known) -> str:
    """Of its base models the first by name; "" while none is known."""
    facts = known.facts or EngineFacts(known.id)
    return min(facts.models - {adapter.name for adapter in facts.adapters}, default="")


def _block_size(known: Known) -> int | None:
    """What its metrics say a hash covers."""
    cache = known.facts.cache if known.facts else None
    return (cache.hash_block_size or cache.block_size) if cache else None


def _events_endpoint(known: Known) -> str | None:
    return known.spec.events_endpoint(known.id.rank) if known.spec else None
