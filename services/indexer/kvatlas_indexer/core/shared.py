"""Lookups over the shared store, without the store: records and block values in, matches out.

A reader keeps the records of all engines and gives every slot number in them a bit of its own; a block's value (5 bytes
a holder) becomes a mask of those bits, and the masks are matched exactly as in memory. Numbers in no record are dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvatlas_common.fleet import EngineView, Fleet, Sync
from kvatlas_common.matching import Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.block_values import BlockMasks
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.match import EngineGroups, Plan
from kvatlas_indexer.core.projection import RECORD
from kvatlas_indexer.core.records import EngineRecord
from kvatlas_indexer.core.slots import Place, Slot

MODELS_PLANNED_MAX = 256


class SharedFleet:
    """The engines of all shards at one version of the store. Immutable but for what it remembers."""

    def __init__(self, records: Iterable[EngineRecord] = ()) -> None:
        self._records = {record.view().id: record for record in records}
        self.fleet = Fleet.of(record.view() for record in self._records.values())
        self._slots: dict[int, Slot] = {}
        self._places = {engine: self._placed(engine, record) for engine, record in self._records.items()}
        self.live_slots = frozenset(self._slots)
        self._plans: dict[str, tuple[dict[str, Plan], tuple[EngineId, ...]]] = {}
        self._masks = BlockMasks(self._slots)

    def plan(self, model: str) -> tuple[Mapping[str, Plan], tuple[EngineId, ...]]:
        """Per hash profile how its engines are matched, and the engines of which nothing is known.

        Raises `UnknownModel`.
        """
        if model not in self._plans:
            if len(self._plans) >= MODELS_PLANNED_MAX:
                self._plans.clear()
            self._plans[model] = self._planned(model)
        return self._plans[model]

    def masks(self, values: Sequence[bytes | None]) -> list[int]:
        """Block values to masks of live holders; 0 for a block nobody holds."""
        return self._masks.masks(values)

    def holders(self, model: str, value: bytes | None) -> tuple[Holder, ...]:
        """Raises `UnknownModel`."""
        serving = {view.id for view in self._serving(model)}
        found: list[Holder] = []
        for number, copies in RECORD.iter_unpack(value or b""):
            slot = self._slots.get(number)
            if slot is not None and slot.engine in serving:
                doubtful = slot.doubtful_since is not None
                found.append(Holder(slot.engine, slot.group, slot.medium, copies, doubtful))
        return tuple(found)

    def _placed(self, engine: EngineId, record: EngineRecord) -> dict[tuple[int, Medium], Place]:
        places: dict[tuple[int, Medium], Place] = {}
        for written in record.places:
            medium = Medium(written.medium)
            place = Place(self._slot(written.live, engine, written.group, medium))
            for number, since in zip(written.doubts, written.doubtful_since, strict=False):
                slot = self._slot(number, engine, written.group, medium)
                slot.doubtful_since = since
                place.doubts.append(slot)
            place.doubt_mask = sum(slot.bit for slot in place.doubts)
            places[written.group, medium] = place
        return places

    def _slot(self, number: int, engine: EngineId, group: int, medium: Medium) -> Slot:
        slot = self._slots[number] = Slot(len(self._slots), engine, group, medium)
        return slot

    def _planned(self, model: str) -> tuple[dict[str, Plan], tuple[EngineId, ...]]:
        by_profile: dict[str, list[EngineGroups]] = {}
        unknown: list[EngineId] = []
        for view in self._serving(model):
            record = self._records[view.id]
            if view.profile is None or not record.heard:
                unknown.append(view.id)
                continue
            size, exact = view.block_size or 1, view.sync is Sync.EXACT
            places, rules = self._places[view.id], record.group_rules()
            groups = EngineGroups(view.id, exact, places, rules, size, record.drop_last_blocks)
            by_profile.setdefault(view.profile, []).append(groups)
        return {profile: Plan(groups) for profile, groups in by_profile.items()}, tuple(unknown)

    def _serving(self, model: str) -> tuple[EngineView, ...]:
        serving = self.fleet.serving(model)
        if not serving and not any(view.serves(model) for view in self.fleet.engines.values()):
            raise UnknownModel(model)
        return serving
