"""Which (engine, group, medium) hold which blocks, in memory.

Every (engine, group, medium) has a *slot*: one bit. A block key maps to the integer that has the bits of its holders,
so a lookup is a dictionary access, a whole fleet is compared with one AND, and a block with one holder costs no more
than its key. Copies beyond the first are counted beside, per slot: an engine that computed a block twice publishes it
stored twice and removed twice, and a set would forget it too early.

Slots are also the generations. A clear, a restart or a death *retires* the slots of an engine, which costs nothing
whatever they hold: no reader asks for their bits any more, the next store gets a new slot, and a sweep takes the old
bits out in the background before they are used again. A loss of messages sets slots *doubtful* the same way: their
entries still count, but whatever is stored or removed from then on is settled, and in the end they are retired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvatlas_common.matching import Holder
from kvatlas_common.words import EngineId, Medium

_PARTS = 1024  # the key space in parts, so that the sweep never holds up anyone for more than one of them
_PART_MASK = _PARTS - 1
DOUBTS_MAX = 4
"""Doubtful slots an (engine, group, medium) may have at once; beyond, the oldest, most doubtful one is retired."""


class Slot:
    """One bit of residency: what one (engine, group, medium) has stored in one generation."""

    __slots__ = ("bit", "blocks", "copies", "doubtful_since", "engine", "group", "index", "medium")

    def __init__(self, index: int, engine: EngineId, group: int, medium: Medium) -> None:
        self.index = index
        self.bit = 1 << index
        self.engine = engine
        self.group = group
        self.medium = medium
        self.doubtful_since: float | None = None
        self.blocks = 0  # keys that have this bit
        self.copies: dict[int, int] = {}  # key -> copies, where there is more than one


class Place:
    """An (engine, group, medium): the slot that is written, and the doubtful ones before it, oldest first."""

    __slots__ = ("doubt_mask", "doubts", "live")

    def __init__(self, live: Slot) -> None:
        self.live = live
        self.doubts: list[Slot] = []
        self.doubt_mask = 0

    @property
    def mask(self) -> int:
        return self.live.bit | self.doubt_mask

    def slots(self) -> list[Slot]:
        return [*self.doubts, self.live]


class Residency:
    """The memory store. Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._parts: list[dict[int, int]] = [{} for _ in range(_PARTS)]
        self._places: dict[tuple[EngineId, int, Medium], Place] = {}
        self._by_engine: dict[EngineId, list[tuple[int, Medium]]] = {}
        self._slots: list[Slot | None] = []
        self._free: list[int] = []
        self._retired: list[int] = []  # bits no reader asks for, still set in some entries
        self._sweeping: list[int] = []  # those of them this pass of the sweep takes out
        self._sweep_part = 0
        self.version = 0
        """Rises whenever the slots of any engine change: what was derived from `places` is then stale."""

    # -- writing -------------------------------------------------------------------------------------------------------

    def store(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> None:
        """One more copy of each block."""
        place = self._place(engine, group, medium)
        if place.doubts:
            keys = list(keys)
            self._settle(place, keys)
        slot, parts = place.live, self._parts
        bit, new = slot.bit, 0
        for key in keys:
            part = parts[key & _PART_MASK]
            holders = part.get(key)
            if holders is None:
                part[key] = bit
                new += 1
            elif not holders & bit:
                part[key] = holders | bit
                new += 1
            else:
                slot.copies[key] = slot.copies.get(key, 1) + 1
        slot.blocks += new

    def hold(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> None:
        """The engine holds these blocks, whatever it said before: one copy, never more."""
        held = self._place(engine, group, medium).live
        self.store(engine, group, medium, [k for k in keys if not self._holders(k) & held.bit])

    def remove(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> int:
        """One copy less of each block; returns how many were not there."""
        place = self._places.get((engine, group, medium))
        if place is None:
            return sum(1 for _ in keys)
        missing, gone, slot = 0, 0, place.live
        for key in keys:
            holders = self._holders(key)
            if holders & slot.bit:
                copies = slot.copies.get(key, 1)
                if copies > 1:
                    self._set_copies(slot, key, copies - 1)
                else:
                    self._put(key, holders & ~slot.bit)
                    gone += 1
            elif holders & place.doubt_mask:
                self._settle(place, [key])
            else:
                missing += 1
        slot.blocks -= gone
        return missing

    def clear(self, engine: EngineId, media: Iterable[Medium] = tuple(Medium)) -> None:
        """Forget what an engine holds in these media, at once."""
        wanted = frozenset(media)
        for group, medium in list(self._by_engine.get(engine, ())):
            if medium in wanted:
                for slot in self._places.pop((engine, group, medium)).slots():
                    self._retire(slot)
                self._by_engine[engine].remove((group, medium))
        if not self._by_engine.get(engine):
            self._by_engine.pop(engine, None)

    def doubt(self, engine: EngineId, now: float, media: Iterable[Medium] = tuple(Medium)) -> None:
        """What an engine holds stays usable but doubtful, until a store confirms it or `expire_doubts` takes it."""
        wanted = frozenset(media)
        for group, medium in self._by_engine.get(engine, ()):
            place = self._places[engine, group, medium]
            if medium not in wanted or not place.live.blocks:
                continue
            place.live.doubtful_since = now
            place.doubts.append(place.live)
            place.live = self._new_slot(engine, group, medium)
            while len(place.doubts) > DOUBTS_MAX:
                self._retire(place.doubts.pop(0))
            self._count_doubts(place)

    def expire_doubts(self, before: float, engine: EngineId | None = None) -> None:
        """Forget doubtful entries that came into doubt before a time."""
        for (owner, _, _), place in self._places.items():
            if place.doubts and engine in {None, owner}:
                for slot in [s for s in place.doubts if s.doubtful_since is not None and s.doubtful_since < before]:
                    place.doubts.remove(slot)
                    self._retire(slot)
                self._count_doubts(place)

    def rename(self, engine: EngineId, names: Sequence[tuple[int, int]]) -> None:
        """(old key, new key) pairs: what the engine holds under the old key, it holds under the new one."""
        for group, medium in list(self._by_engine.get(engine, ())):
            for slot in self._places[engine, group, medium].slots():
                for old, new in names:
                    holders = self._holders(old)
                    if not holders & slot.bit:
                        continue
                    copies = slot.copies.pop(old, 1)
                    self._put(old, holders & ~slot.bit)
                    into = self._holders(new)
                    total = copies + (slot.copies.get(new, 1) if into & slot.bit else 0)
                    slot.blocks -= 1 if into & slot.bit else 0
                    self._put(new, into | slot.bit)
                    self._set_copies(slot, new, total)

    # -- reading -------------------------------------------------------------------------------------------------------

    def masks(self, keys: Iterable[int]) -> list[int]:
        """Per key the bits of its holders; 0 where nobody holds it. Bits of retired slots may still be set."""
        parts = self._parts
        return [parts[key & _PART_MASK].get(key, 0) for key in keys]

    def places(self, engine: EngineId) -> dict[tuple[int, Medium], Place]:
        return {at: self._places[engine, *at] for at in self._by_engine.get(engine, ())}

    def holders(self, key: int) -> list[Holder]:
        mask, found = self._holders(key), []
        while mask:
            low = mask & -mask
            mask ^= low
            slot = self._slots[low.bit_length() - 1]
            if slot is not None:
                copies = slot.copies.get(key, 1)
                doubtful = slot.doubtful_since is not None
                found.append(Holder(slot.engine, slot.group, slot.medium, copies, doubtful))
        return found

    def blocks(self, engine: EngineId) -> dict[Medium, int]:
        """Distinct blocks held per medium, doubtful ones included, over all groups."""
        counts: dict[Medium, int] = {}
        for (_, medium), place in self.places(engine).items():
            counts[medium] = counts.get(medium, 0) + sum(slot.blocks for slot in place.slots())
        return counts

    def table(self, engine: EngineId) -> dict[tuple[int, Medium, int], int]:
        """(group, medium, key) -> copies: all an engine holds. For checkers: it walks the whole index."""
        slots = [s for place in self.places(engine).values() for s in place.slots()]
        return {
            (s.group, s.medium, key): s.copies.get(key, 1)
            for part in self._parts
            for key, mask in part.items()
            for s in slots
            if mask & s.bit
        }

    def __len__(self) -> int:
        """Keys, including those only retired slots still hold."""
        return sum(map(len, self._parts))

    # -- the sweep -----------------------------------------------------------------------------------------------------

    @property
    def unswept(self) -> int:
        """Slots retired and not yet taken out."""
        return len(self._retired) + len(self._sweeping)

    def sweep(self, parts: int = 16) -> bool:
        """Takes retired bits out of the next parts of the key space; False when there is nothing to do."""
        if not self._sweeping:
            if not self._retired:
                return False
            self._sweeping, self._retired, self._sweep_part = self._retired, [], 0
        dead = sum(1 << index for index in self._sweeping)
        for part in self._parts[self._sweep_part : self._sweep_part + parts]:
            for key in [key for key, holders in part.items() if holders & dead]:
                left = part[key] & ~dead
                if left:
                    part[key] = left
                else:
                    del part[key]
        self._sweep_part += parts
        if self._sweep_part >= _PARTS:
            self._free += self._sweeping
            self._sweeping = []
        return True

    # -- within --------------------------------------------------------------------------------------------------------

    def _holders(self, key: int) -> int:
        return self._parts[key & _PART_MASK].get(key, 0)

    def _put(self, key: int, holders: int) -> None:
        part = self._parts[key & _PART_MASK]
        if holders:
            part[key] = holders
        else:
            part.pop(key, None)

    @staticmethod
    def _set_copies(slot: Slot, key: int, copies: int) -> None:
        if copies > 1:
            slot.copies[key] = copies
        else:
            slot.copies.pop(key, None)

    def _settle(self, place: Place, keys: Iterable[int]) -> None:
        """These keys are no longer in doubt: the doubtful slots let go of them."""
        for key in keys:
            holders = self._holders(key)
            if not holders & place.doubt_mask:
                continue
            for slot in place.doubts:
                if holders & slot.bit:
                    slot.blocks -= 1
                    slot.copies.pop(key, None)
            self._put(key, holders & ~place.doubt_mask)

    def _place(self, engine: EngineId, group: int, medium: Medium) -> Place:
        place = self._places.get((engine, group, medium))
        if place is None:
            place = self._places[engine, group, medium] = Place(self._new_slot(engine, group, medium))
            self._by_engine.setdefault(engine, []).append((group, medium))
        return place

    def _new_slot(self, engine: EngineId, group: int, medium: Medium) -> Slot:
        if self._free:
            index = self._free.pop()
        else:
            index = len(self._slots)
            self._slots.append(None)
        slot = self._slots[index] = Slot(index, engine, group, medium)
        self.version += 1
        return slot

    def _retire(self, slot: Slot) -> None:
        self._slots[slot.index] = None
        self._retired.append(slot.index)
        self.version += 1

    def _count_doubts(self, place: Place) -> None:
        place.doubt_mask = sum(slot.bit for slot in place.doubts)
        self.version += 1
