"""From an engine in this shard's index to its record, and back: how an engine changes hands.

What a successor gets is where the owner stood (`EngineRecord`), how far each partition of the store had come
(`Reached`), and the blocks themselves. Partitions may have come differently far: what is applied again then passes
those over that have it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.fleet import Health
from kvatlas_common.words import Medium
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.naming import Expected
from kvatlas_indexer.core.projection import Projection
from kvatlas_indexer.core.records import EngineRecord, NamingRecord, PlaceRecord, RuleRecord, StreamRecord
from kvatlas_indexer.core.residency import Residency


@dataclass(frozen=True, slots=True)
class Reached:
    """The last message of an epoch that a partition has whole, with its time and the digest of its bytes."""

    epoch: int
    seq: int
    ts: float
    digest: int


Holding = tuple[int, int, int]
"""Block key, slot number, copies: one record of the store."""


def describe(known: Known, expected: Expected, projection: Projection, residency: Residency) -> EngineRecord:
    view, engine = known.view(expected), known.engine
    places = residency.places(known.id)
    naming = engine.naming
    return EngineRecord(
        engine=str(view.id),
        epoch=engine.epoch,
        url=view.url,
        models=sorted(view.models),
        adapters=list(view.adapters),
        root=view.root,
        health=view.health,
        profile=view.profile,
        profile_verified=view.profile_verified,
        block_size=view.block_size,
        sync=view.sync,
        inexact_reason=view.inexact_reason,
        max_model_len=view.max_model_len,
        kv_tokens=view.kv_tokens,
        heard=known.can_be_matched(view),
        drop_last_blocks=engine.drop_last_blocks,
        places=[
            PlaceRecord(
                group,
                medium,
                projection.number(place.live),
                [projection.number(slot) for slot in place.doubts],
                [slot.doubtful_since or 0.0 for slot in place.doubts],
            )
            for (group, medium), place in places.items()
        ],
        rules=[RuleRecord(group, rule.name, rule.window) for group, rule in engine.rules.items()],
        stream=StreamRecord(*engine.stream.standing()),
        naming=NamingRecord(
            naming.reproduces, naming.profile.name if naming.profile else None, naming.verified, naming.extras_proven
        ),
        listened=known.speaks,
        labels=view.labels,
    )


def resume(
    known: Known,
    record: EngineRecord,
    reached: Sequence[Reached | None],
    holdings: Iterable[Holding],
    residency: Residency,
) -> bool:
    """Sets an engine that this shard knows nothing of yet to where its last owner stood.

    False if that cannot be trusted, and the engine begins like one never heard of: a partition has lost what it was
    told, or belongs to another epoch, or the names of recomputed blocks went with their owner.
    """
    known.speaks = record.listened
    if record.health is Health.READY:  # until its new owner's first probe
        known.facts = EngineFacts(
            known.id,
            health=record.health,
            models=frozenset(record.models),
            adapters=tuple(record.adapters),
            root=record.root,
            max_model_len=record.max_model_len,
        )
    at = [r for r in reached if r is not None and r.epoch == record.epoch]
    if len(at) < len(reached) or not at or not record.naming.own:
        known.engine.epoch = record.epoch + 1
        return False
    lowest = min(at, key=lambda r: r.seq)
    _restore(known, record, holdings, residency)
    engine = known.engine
    engine.epoch = record.epoch
    engine.rules.update(record.group_rules())
    engine.stream.resume(
        last=lowest.seq,
        ts=lowest.ts,
        digest=lowest.digest,
        standing=(record.stream.whole, record.stream.loss, record.stream.epoch_ts, record.stream.process_start),
    )
    profile = HashProfile.parse(record.naming.profile) if record.naming.profile else None
    engine.naming.resume(profile, record.naming.verified, record.naming.extras_proven, record.block_size)
    ahead = {partition: r.seq for partition, r in enumerate(at) if r.seq > lowest.seq}
    engine.pass_over(len(reached), ahead)
    return True


def _restore(known: Known, record: EngineRecord, holdings: Iterable[Holding], residency: Residency) -> None:
    held: dict[int, dict[int, int]] = {number: {} for number in record.slot_numbers()}
    for key, number, copies in holdings:
        if number in held:
            held[number][key] = copies
    for place in record.places:
        at = (place.group, Medium(place.medium))
        doubts: Mapping[int, float] = dict(zip(place.doubts, place.doubtful_since, strict=False))
        for number, since in doubts.items():
            residency.restore(known.id, at, held[number], number=number, since=since)
        residency.restore(known.id, at, held[place.live], number=place.live, since=None)
