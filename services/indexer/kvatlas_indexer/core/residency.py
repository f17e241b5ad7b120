"""Which (engine, group, medium) hold which blocks, in memory.

Every (engine, group, medium) has a *slot*: one bit. A block key maps to the integer that has the bits of its holders
(see `block_map`), so a whole fleet is compared with one AND. Copies beyond the first are counted beside, per slot: an
engine that computed a block twice publishes it stored twice and removed twice, and a set would forget it too early.

Slots are also the generations. A clear, a restart or a death *retires* the slots of an engine, which costs nothing
whatever they hold: no reader asks for their bits any more, the next store gets a new slot, and a sweep takes the old
bits out in the background before they are used again. A loss of messages sets slots *doubtful* the same way: their
entries still count until a store or a removal settles them, and in the end they are retired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvatlas_common.matching import Holder, PromptKeys
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.block_map import BlockMap
from kvatlas_indexer.core.slots import Journal, Place, Slot

_FREED_AT_ONCE = 4096
DOUBTS_MAX = 16
"""Doubtful slots an (engine, group, medium) may have at once; beyond, the oldest, most doubtful one is retired."""


class Residency:
    """The memory store. Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._blocks = BlockMap()
        self._engines: dict[EngineId, dict[tuple[int, Medium], Place]] = {}
        self._slots: list[Slot | None] = []
        self._free: list[int] = []
        self._retired: list[int] = []  # bits no reader asks for, still set in some entries
        self._sweeping: list[int] = []  # those of them this pass of the sweep takes out
        self._buried: list[dict[int, Any]] = []  # what nobody needs any more, freed by the sweep bit by bit
        self.journal: Journal | None = None
        self.on_removed: Callable[[EngineId, Sequence[int]], None] | None = None
        self.version = 0
        """Rises whenever the slots of any engine change: what was derived from `places` is then stale."""

    # -- writing -------------------------------------------------------------------------------------------------------

    def store(
        self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int], after: int | None = None
    ) -> None:
        """One more copy of each block. In doubt before, it is a first one: how many there were is not known.

        `after`: the block that these follow, where that is known; it makes lookups quicker, and nothing else.
        """
        place, keys = self._place(engine, group, medium), list(keys)
        if place.doubts:
            self._settle(place, keys)
        slot, bit, copies = place.live, place.live.bit, place.live.copies
        for holders, some in self._blocks.change(keys, lambda holders: holders | bit, after).items():
            if not holders & bit:
                slot.blocks += len(some)
                continue
            for key in some:
                copies[key] = copies.get(key, 1) + 1
        if self.journal is not None:
            self.journal.touch(slot, keys)

    def hold(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int], after: int | None = None) -> None:
        """The engine holds these blocks, whatever it said before: one copy, never more."""
        bit, once = self._place(engine, group, medium).live.bit, list(dict.fromkeys(keys))
        held = self._blocks.get_all(once)
        self.store(engine, group, medium, [k for k, h in zip(once, held, strict=True) if not h & bit], after)

    def remove(self, engine: EngineId, group: int, medium: Medium, keys: Iterable[int]) -> int:
        """One copy less of each block; returns how many were not there."""
        place, keys = self._engines.get(engine, {}).get((group, medium)), list(keys)
        if self.on_removed is not None:
            self.on_removed(engine, keys)
        if place is None:
            return len(keys)
        slot, missing = place.live, 0
        bit, doubt_mask = slot.bit, place.doubt_mask
        last = [key for key in keys if not self._had_copies(slot, key)] if slot.copies else keys
        # The last block of a prompt goes first: the other way round they are in a row.
        for holders, some in self._blocks.change(last[::-1], lambda holders: holders & ~bit).items():
            if holders & bit:
                slot.blocks -= len(some)
            elif not holders & doubt_mask:
                missing += len(some)
            else:
                missing += sum(not self._remove_doubtful(place, key) for key in some)
        if self.journal is not None:
            self.journal.touch(slot, keys)
        return missing

    def _had_copies(self, slot: Slot, key: int) -> bool:
        """Whether there was more than one; now there is one less."""
        copies = slot.copies.get(key)
        if copies is None:
            return False
        self._set_copies(slot, key, copies - 1)
        return True

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
                holding = [slot for slot in slots if self._blocks.get(new) & slot.bit]
                for slot in holding[:-1]:
                    self._let_go(slot, new)

    def bury(self, unneeded: dict[int, Any]) -> None:
        """Leave it to the sweep to free a map of any size: freeing it at once would stall everything else."""
        if unneeded:
            self._buried.append(unneeded)

    # -- reading -------------------------------------------------------------------------------------------------------

    def masks(self, keys: PromptKeys) -> list[int]:
        """Per key the bits of its holders; 0 where nobody holds it. Bits of retired slots may still be set."""
        return self._blocks.get_all(keys)

    def leading_masks(self, keys: PromptKeys) -> list[int]:
        """The same, up to the first block that nobody holds: most prompts are new from some block on."""
        masks: list[int] = []
        for stretch in self._blocks.stretches(keys):
            if not stretch[0]:
                break
            masks += stretch
        return masks

    def fall_outs(self, keys: PromptKeys, bits: int) -> list[tuple[int, int]]:
        """After how many leading blocks which of these bits fall out: (blocks, bits), in order; all of them, once each.

        The same as an AND over `leading_masks`, in one pass: the lookup of a whole fleet is this loop.
        """
        found: list[tuple[int, int]] = []
        alive, same, depth = bits, -1, 0
        for stretch in self._blocks.stretches(keys):
            for holders in stretch:
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
        mask, found = self._blocks.get(key), []
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
        held = self.keys_of(self.slots(engine)).items()
        return {(s.group, s.medium, key): s.copies.get(key, 1) for s, keys in held for key in keys}

    def __len__(self) -> int:
        """Keys, including those only retired slots still hold."""
        return len(self._blocks)

    # -- for a copy elsewhere ------------------------------------------------------------------------------------------

    def slots(self, engine: EngineId) -> list[Slot]:
        return [slot for place in self._engines.get(engine, {}).values() for slot in place.slots()]

    def is_live(self, slot: Slot) -> bool:
        return self._slots[slot.index] is slot

    def copies(self, slot: Slot, keys: Sequence[int]) -> list[int]:
        """Of each block in one slot; 0 where it holds none."""
        bit, counted, held = slot.bit, slot.copies, self._blocks.get_all(keys)
        return [counted.get(key, 1) if holders & bit else 0 for key, holders in zip(keys, held, strict=True)]

    def keys_of(self, slots: Sequence[Slot]) -> dict[Slot, list[int]]:
        """The blocks of each slot, in one walk over the whole index."""
        return dict(zip(slots, self._blocks.keys_with([slot.bit for slot in slots]), strict=True))

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
        self._blocks.change(list(copies), lambda holders: holders | slot.bit)
        for key, count in copies.items():
            self._set_copies(slot, key, count)
        slot.blocks = len(copies)

    # -- the sweep -----------------------------------------------------------------------------------------------------

    @property
    def unswept(self) -> int:
        """Slots retired and not yet taken out."""
        return len(self._retired) + len(self._sweeping)

    def sweep(self) -> bool:
        """Takes retired bits out of the next blocks; False when there is nothing to do."""
        busy = self._free_buried()
        if not self._blocks.in_pass:
            if not self._retired:
                return busy
            self._sweeping, self._retired = self._retired, []
            self._blocks.begin_pass(sum(1 << index for index in self._sweeping))
        if not self._blocks.step():
            self._free += self._sweeping
            self._sweeping = []
        return True

    def _free_buried(self) -> bool:
        if not self._buried:
            return False
        unneeded = self._buried[-1]
        for _ in range(min(len(unneeded), _FREED_AT_ONCE)):
            unneeded.popitem()
        if not unneeded:
            self._buried.pop()
        return True

    # -- within --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _set_copies(slot: Slot, key: int, copies: int) -> None:
        if copies > 1:
            slot.copies[key] = copies
        else:
            slot.copies.pop(key, None)

    def _settle(self, place: Place, keys: Iterable[int]) -> None:
        """These keys are no longer in doubt: the doubtful slots let go of them."""
        once = list(dict.fromkeys(keys))
        for key, holders in zip(once, self._blocks.get_all(once), strict=True):
            for slot in place.doubts if holders & place.doubt_mask else ():
                if holders & slot.bit:
                    self._let_go(slot, key)

    def _let_go(self, slot: Slot, key: int) -> None:
        """Of a block it holds, whatever the copies."""
        slot.blocks -= 1
        slot.copies.pop(key, None)
        self._blocks.put(key, self._blocks.get(key) & ~slot.bit)
        self._touch(slot, key)

    def _remove_doubtful(self, place: Place, key: int) -> bool:
        """One copy less of a doubtful block: while there may be another it stays doubtful. False: there is none."""
        holders = self._blocks.get(key)
        for slot in place.doubts:
            if holders & slot.bit:
                copies = slot.copies.get(key, 1)
                self._set_copies(slot, key, copies - 1)
                if copies == 1:
                    slot.blocks -= 1
                    self._blocks.put(key, holders & ~slot.bit)
                self._touch(slot, key)
                return True
        return False

    def _rename(self, slot: Slot, old: int, new: int) -> None:
        holders = self._blocks.get(old)
        if old == new or not holders & slot.bit:
            return
        copies = slot.copies.pop(old, 1)
        self._blocks.put(old, holders & ~slot.bit)
        into = self._blocks.get(new)
        if into & slot.bit:
            copies += slot.copies.get(new, 1)
            slot.blocks -= 1
        self._blocks.put(new, into | slot.bit)
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
