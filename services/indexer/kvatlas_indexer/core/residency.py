"""Which (engine, group, medium) hold which blocks, in memory.

Every (engine, group, medium) has a *slot*: one bit. A block key maps to the integer that has the bits of its holders,
so a lookup is a dictionary access, a whole fleet is compared with one AND, and a block with one holder costs no more
than its key. Copies beyond the first are counted beside, per slot: an engine that computed a block twice publishes it
stored twice and removed twice, and a set would forget it too early.

Slots are also the generations. A clear, a restart or a death *retires* the slots of an engine, which costs nothing
whatever they hold: no reader asks for their bits any more, the next store gets a new slot, and a sweep takes the old
bits out in the background before they are used again. A loss of messages sets slots *doubtful* the same way: their
entries still count until a store or a removal settles them, and in the end they are retired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvatlas_common.matching import Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.slots import Journal, Place, Slot

_PARTS = 256  # the key space in parts, so that the sweep never holds up anyone for more than one of them
_PART_MASK = _PARTS - 1
_SWEEP_KEYS_MAX = 4096  # taken out in one step of the sweep: a few milliseconds
_LOOKED_UP_AT_ONCE = 128
DOUBTS_MAX = 16
"""Doubtful slots an (engine, group, medium) may have at once; beyond, the oldest, most doubtful one is retired."""


class Residency:
    """The memory store. Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._parts: list[dict[int, int]] = [{} for _ in range(_PARTS)]
        self._engines: dict[EngineId, dict[tuple[int, Medium], Place]] = {}
        self._slots: list[Slot | None] = []
        self._free: list[int] = []
        self._retired: list[int] = []  # bits no reader asks for, still set in some entries
        self._sweeping: list[int] = []  # those of them this pass of the sweep takes out
        self._sweep_part = 0
        self._dying: list[int] = []  # keys of the parts swept last that still have bits to be taken out
        self._buried: list[dict[int, Any]] = []  # what nobody needs any more, freed by the sweep bit by bit
        self.journal: Journal | None = None
        self.on_removed: Callable[[EngineId, Sequence[int]], None] | None = None
        self.version = 0
        """Rises whenever the slots of any engine change: what was derived from `places` is then stale."""

    # -- writing -------------------------------------------------------------------------------------------------------

    def store(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> None:
        """One more copy of each block. In doubt before, it is a first one: how many there were is not known."""
        place, keys = self._place(engine, group, medium), list(keys)
        if place.doubts:
            self._settle(place, keys)
        slot, parts = place.live, self._parts
        bit, new = slot.bit, 0
        before = after = 0  # blocks in a row mostly have the same holders: they share one integer
        for key in keys:
            part = parts[key & _PART_MASK]
            holders = part.get(key)
            if holders is None:
                part[key] = bit
                new += 1
            elif not holders & bit:
                if holders != before:
                    before, after = holders, holders | bit
                part[key] = after
                new += 1
            else:
                slot.copies[key] = slot.copies.get(key, 1) + 1
        slot.blocks += new
        if self.journal is not None:
            self.journal.touch(slot, keys)

    def hold(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> None:
        """The engine holds these blocks, whatever it said before: one copy, never more."""
        bit = self._place(engine, group, medium).live.bit
        self.store(engine, group, medium, [k for k in dict.fromkeys(keys) if not self._holders(k) & bit])

    def remove(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> int:
        """One copy less of each block; returns how many were not there."""
        place, keys = self._engines.get(engine, {}).get((group, medium)), list(keys)
        if self.on_removed is not None:
            self.on_removed(engine, keys)
        if place is None:
            return len(keys)
        missing, gone, slot, parts = 0, 0, place.live, self._parts
        bit, doubt_mask, counted = slot.bit, place.doubt_mask, slot.copies
        for key in keys:
            part = parts[key & _PART_MASK]
            holders = part.get(key, 0)
            if holders & bit:
                if counted and key in counted:
                    self._set_copies(slot, key, counted[key] - 1)
                    continue
                gone += 1
                if holders == bit:
                    del part[key]
                else:
                    part[key] = holders & ~bit
            elif holders & doubt_mask:
                self._remove_doubtful(place, key)
            else:
                missing += 1
        slot.blocks -= gone
        if self.journal is not None:
            self.journal.touch(slot, keys)
        return missing

    def clear(self, engine: EngineId, media: Iterable[Medium] = tuple(Medium)) -> None:
        """Forget what an engine holds in these media, at once."""
        wanted, places = frozenset(media), self._engines.get(engine, {})
        for at in [at for at in places if at[1] in wanted]:
            for slot in places.pop(at).slots():
                self._retire(slot)
        if not places:
            self._engines.pop(engine, None)

    def doubt(self, engine: EngineId, now: float, media: Iterable[Medium] = tuple(Medium)) -> None:
        """What an engine holds stays usable but doubtful, until a store confirms it or `expire_doubts` takes it."""
        wanted = frozenset(media)
        for (group, medium), place in self._engines.get(engine, {}).items():
            if medium not in wanted or not place.live.blocks:
                continue
            place.live.doubtful_since = now
            place.doubts.append(place.live)
            place.live = self._new_slot(engine, group, medium)
            self.keep_doubts(place, DOUBTS_MAX)

    def expire_doubts(self, before: float, engine: EngineId | None = None) -> None:
        """Forget doubtful entries that came into doubt before a time."""
        for owner in list(self._engines) if engine is None else [engine]:
            for place in self._engines.get(owner, {}).values():
                fresh = sum(1 for s in place.doubts if s.doubtful_since is not None and s.doubtful_since >= before)
                if fresh < len(place.doubts):
                    self.keep_doubts(place, fresh)

    def keep_doubts(self, place: Place, count: int) -> None:
        """Forget all doubtful generations of a place but the latest `count`."""
        dropped = max(0, len(place.doubts) - count)
        for slot in place.doubts[:dropped]:
            self._retire(slot)
        del place.doubts[:dropped]
        place.doubt_mask = sum(slot.bit for slot in place.doubts)
        self.version += 1

    def rename(self, engine: EngineId, names: Sequence[tuple[int, int]]) -> None:
        """(old key, new key) pairs: what the engine holds under the old key, it holds under the new one.

        A block that it turns out to hold under two names stays where it was stored last: it is in one slot of a place.
        """
        for place in self._engines.get(engine, {}).values():
            slots = place.slots()
            for old, new in names:
                for slot in slots:
                    self._rename(slot, old, new)
                holding = [slot for slot in slots if self._holders(new) & slot.bit]
                for slot in holding[:-1]:
                    self._let_go(slot, new)

    def bury(self, unneeded: dict[int, Any]) -> None:
        """Leave it to the sweep to free a map of any size: freeing it at once would stall everything else."""
        if unneeded:
            self._buried.append(unneeded)

    # -- reading -------------------------------------------------------------------------------------------------------

    def masks(self, keys: Iterable[int]) -> list[int]:
        """Per key the bits of its holders; 0 where nobody holds it. Bits of retired slots may still be set."""
        parts = self._parts
        return [parts[key & _PART_MASK].get(key, 0) for key in keys]

    def leading_masks(self, keys: Sequence[int]) -> list[int]:
        """The same, up to the first block that nobody holds: most prompts are new from some block on."""
        masks: list[int] = []
        for start in range(0, len(keys), _LOOKED_UP_AT_ONCE):
            found = self.masks(keys[start : start + _LOOKED_UP_AT_ONCE])
            if 0 in found:
                return masks + found[: found.index(0)]
            masks += found
        return masks

    def fall_outs(self, keys: Iterable[int], bits: int) -> list[tuple[int, int]]:
        """After how many leading blocks which of these bits fall out: (blocks, bits), in order; all of them, once each.

        The same as an AND over `leading_masks`, in one pass: the lookup of a whole fleet is this loop.
        """
        found, parts, alive, same, depth = list[tuple[int, int]](), self._parts, bits, -1, 0
        for key in keys:
            holders = parts[key & _PART_MASK].get(key, 0)
            if holders is not same:  # of the same value or not: blocks in a row mostly share one integer
                left = alive & holders
                if left != alive:
                    found.append((depth, alive ^ left))
                    if not left:
                        return found
                    alive = left
                same = holders
            depth += 1
        if alive:
            found.append((depth, alive))
        return found

    def places(self, engine: EngineId) -> dict[tuple[int, Medium], Place]:
        """By (group, medium)."""
        return dict(self._engines.get(engine, {}))

    def place(self, engine: EngineId, group: int, medium: Medium) -> Place | None:
        return self._engines.get(engine, {}).get((group, medium))

    def in_doubt(self, engine: EngineId) -> bool:
        """Whether any of what an engine holds is doubtful."""
        return any(place.doubts for place in self._engines.get(engine, {}).values())

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
        for (_, medium), place in self._engines.get(engine, {}).items():
            counts[medium] = counts.get(medium, 0) + sum(slot.blocks for slot in place.slots())
        return counts

    def table(self, engine: EngineId) -> dict[tuple[int, Medium, int], int]:
        """(group, medium, key) -> copies: all an engine holds. For checkers: it walks the whole index."""
        slots = [s for place in self._engines.get(engine, {}).values() for s in place.slots()]
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

    # -- for a copy elsewhere ------------------------------------------------------------------------------------------

    def slots(self, engine: EngineId) -> list[Slot]:
        return [slot for place in self._engines.get(engine, {}).values() for slot in place.slots()]

    def is_live(self, slot: Slot) -> bool:
        return self._slots[slot.index] is slot

    def copies(self, slot: Slot, keys: Iterable[int]) -> list[int]:
        """Of each block in one slot; 0 where it holds none."""
        parts, bit, counted = self._parts, slot.bit, slot.copies
        return [counted.get(key, 1) if parts[key & _PART_MASK].get(key, 0) & bit else 0 for key in keys]

    def keys_of(self, slots: Sequence[Slot]) -> dict[Slot, list[int]]:
        """The blocks of each slot, in one walk over the whole index."""
        found: dict[Slot, list[int]] = {slot: [] for slot in slots}
        bits = [(slot.bit, found[slot]) for slot in slots]
        any_of_them = sum(slot.bit for slot in slots)
        for part in self._parts:
            for key, holders in part.items():
                if holders & any_of_them:
                    for bit, keys in bits:
                        if holders & bit:
                            keys.append(key)
        return found

    def restore(
        self, engine: EngineId, at: tuple[int, Medium], copies: Mapping[int, int], *, number: int, since: float | None
    ) -> None:
        """Takes over a slot at (group, medium), oldest first; `since`: when it came into doubt, None: it is written."""
        group, medium = at
        slot = self._new_slot(engine, group, medium)
        slot.number, slot.doubtful_since = number, since
        place = self._engines.setdefault(engine, {}).get((group, medium))
        if place is None:
            place = self._engines[engine][group, medium] = Place(slot)
        else:
            place.doubts.append(place.live)
            place.live = slot
            place.doubt_mask = sum(doubtful.bit for doubtful in place.doubts)
        for key, count in copies.items():
            self._put(key, self._holders(key) | slot.bit)
            self._set_copies(slot, key, count)
        slot.blocks = len(copies)

    # -- the sweep -----------------------------------------------------------------------------------------------------

    @property
    def unswept(self) -> int:
        """Slots retired and not yet taken out."""
        return len(self._retired) + len(self._sweeping)

    def sweep(self, parts: int = 16) -> bool:
        """Takes retired bits out of the next parts of the key space; False when there is nothing to do."""
        busy = self._free_buried()
        if not self._sweeping:
            if not self._retired:
                return busy
            self._sweeping, self._retired, self._sweep_part = self._retired, [], 0
        dead = sum(1 << index for index in self._sweeping)
        left, end = _SWEEP_KEYS_MAX, min(self._sweep_part + parts, _PARTS)
        while left > 0 and (self._dying or self._sweep_part < end):
            if not self._dying:
                part = self._parts[self._sweep_part]
                self._dying = [key for key, holders in part.items() if holders & dead]
                self._sweep_part += 1
                left -= 1 + len(part) // 8  # to look at a key costs less than to take it out
            dying, self._dying = self._dying[:_SWEEP_KEYS_MAX], self._dying[_SWEEP_KEYS_MAX:]
            for key in dying:
                self._put(key, self._holders(key) & ~dead)
            left -= len(dying)
        if self._sweep_part == _PARTS and not self._dying:
            self._free += self._sweeping
            self._sweeping = []
        return True

    def _free_buried(self) -> bool:
        if not self._buried:
            return False
        unneeded = self._buried[-1]
        for _ in range(min(len(unneeded), _SWEEP_KEYS_MAX)):
            unneeded.popitem()
        if not unneeded:
            self._buried.pop()
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
                    self._let_go(slot, key)

    def _let_go(self, slot: Slot, key: int) -> None:
        """Of a block it holds, whatever the copies."""
        slot.blocks -= 1
        slot.copies.pop(key, None)
        self._put(key, self._holders(key) & ~slot.bit)
        self._touch(slot, key)

    def _remove_doubtful(self, place: Place, key: int) -> None:
        """One copy less of a doubtful block: as long as there may be another, it stays doubtful."""
        holders = self._holders(key)
        for slot in place.doubts:
            if holders & slot.bit:
                copies = slot.copies.get(key, 1)
                self._set_copies(slot, key, copies - 1)
                if copies == 1:
                    slot.blocks -= 1
                    self._put(key, holders & ~slot.bit)
                self._touch(slot, key)
                return

    def _rename(self, slot: Slot, old: int, new: int) -> None:
        holders = self._holders(old)
        if old == new or not holders & slot.bit:
            return
        copies = slot.copies.pop(old, 1)
        self._put(old, holders & ~slot.bit)
        into = self._holders(new)
        if into & slot.bit:
            copies += slot.copies.get(new, 1)
            slot.blocks -= 1
        self._put(new, into | slot.bit)
        self._set_copies(slot, new, copies)
        self._touch(slot, old, new)

    def _touch(self, slot: Slot, *keys: int) -> None:
        if self.journal is not None:
            self.journal.touch(slot, keys)

    def _place(self, engine: EngineId, group: int, medium: Medium) -> Place:
        places = self._engines.get(engine)
        if places is None:
            places = self._engines[engine] = {}
        place = places.get((group, medium))
        if place is None:
            place = places[group, medium] = Place(self._new_slot(engine, group, medium))
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
        self.bury(slot.copies)
        self.version += 1
        if self.journal is not None:
            self.journal.retired(slot)
