"""An engine as its owner describes it to the other shards, and to whoever takes it over: one JSON record in the store.

The first part is what a lookup needs: the view, the cache groups, and under which slot numbers its blocks are. The
second is where its owner stood: enough for a successor to go on with the next message.
"""

from __future__ import annotations

import msgspec

from kvatlas_common.fleet import Adapter, EngineView, Health, Sync
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.match import GroupRule


class PlaceRecord(msgspec.Struct, frozen=True):
    """The slot numbers of one (group, medium): the one written, and the doubtful ones before it, oldest first."""

    group: int
    medium: str
    live: int
    doubts: list[int] = []
    doubtful_since: list[float] = []


class RuleRecord(msgspec.Struct, frozen=True):
    group: int
    kind: str | None
    window: int | None


class StreamRecord(msgspec.Struct, frozen=True):
    """Where the owner's `Stream` stood; times in seconds since the epoch."""

    whole: bool
    loss: str
    epoch_ts: float | None
    process_start: float | None


class NamingRecord(msgspec.Struct, frozen=True):
    own: bool  # the engine's own hashes; otherwise recomputed, and the names are known to the owner alone
    profile: str | None
    verified: bool
    extras_proven: bool


class EngineRecord(msgspec.Struct, frozen=True):
    engine: str
    epoch: int
    url: str
    models: list[str]
    adapters: list[Adapter]
    root: str | None
    health: Health
    profile: str | None
    profile_verified: bool
    block_size: int | None
    sync: Sync
    inexact_reason: str
    max_model_len: int | None
    kv_tokens: int | None
    heard: bool  # its cache is known, if only that it is empty
    drop_last_blocks: int
    places: list[PlaceRecord]
    rules: list[RuleRecord]
    stream: StreamRecord
    naming: NamingRecord
    listened: bool = False  # it has made itself known: whether it is wanted is not for discovery to say
    labels: tuple[tuple[str, str], ...] = ()

    def view(self) -> EngineView:
        """Raises `ValueError` for an engine name that is none."""
        return EngineView(
            id=EngineId.parse(self.engine),
            url=self.url,
            models=frozenset(self.models),
            adapters=tuple(self.adapters),
            root=self.root,
            health=self.health,
            profile=self.profile,
            profile_verified=self.profile_verified,
            block_size=self.block_size,
            sync=self.sync,
            inexact_reason=self.inexact_reason,
            max_model_len=self.max_model_len,
            kv_tokens=self.kv_tokens,
            labels=self.labels,
        )

    def group_rules(self) -> dict[int, GroupRule]:
        return {rule.group: GroupRule.of(rule.kind, rule.window) for rule in self.rules}

    def lives_on_in(self, later: EngineRecord) -> bool:
        """Whether what the engine held it may hold still: neither restarted nor cleared in between."""
        started, before = self.stream.process_start, self.slot_numbers()
        if self.epoch != later.epoch or (started is not None and started != later.stream.process_start):
            return False
        return not before or not before.isdisjoint(later.slot_numbers())

    def slot_numbers(self) -> set[int]:
        return {number for place in self.places for number in (place.live, *place.doubts)}


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(EngineRecord).decode


def encode_record(record: EngineRecord) -> bytes:
    return _encode(record)


def decode_record(data: bytes) -> EngineRecord:
    """Raises `ValueError`: another version of us wrote it, or somebody else did."""
    try:
        record = _decode(data)
        record.view()
        for place in record.places:
            Medium(place.medium)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"engine record: {error}") from None
    return record
