"""Healing: what the engines' answers tell of blocks that lost messages have left wrong in the index.

Routers tell every shard what they send where, with the prompt's block keys, and how many cached tokens the engine then
reports. One prompt whose answer is comparable is a look into the engine's cache: at the moment the engine took it, its
first `hit` blocks were there and the next one was not. That heals the engine where the index may be wrong for good, and
only by its owner:

| the engine reports ...      | so                                                                                    |
|-----------------------------|---------------------------------------------------------------------------------------|
| `hit` blocks                | doubtful ones among them are settled; those the index did not know of are added       |
| fewer blocks than predicted | the first missing one loses the copies it had when the request was routed; nothing    |
|                             | after it does: nothing is known of those                                              |

*Unknown counts.* A hit proves one copy, not how many there are. So what is settled or added counts one, the least there
is: a later store adds one as always (the engine computed the block again, beside what it has), a removal takes one, and
after as many removals as copies were certain the block is forgotten, although there might be more: its next hit brings
it back. Believing in more would leave blocks in the index that nothing ever removes.

*Races.* The answer comes after the events of the request itself: the block it missed it has computed, and mostly
published, by then. So only the copies from before are taken (a doubtful one went with that store); and none, where the
index knew of more blocks when it was told of the request than the router was promised: what it has been told since may
be that very store. What the engine itself has removed since the request was routed is neither taken nor added: its word
is newer. A clear, a restart or a loss in between leaves nothing to conclude. One request heals what it saw; others
under way that saw the same do not heal it again.

*Not healed* are exact engines, whose differences are counted by cause (`differences`); engines merely out of reach,
whose next message or replay tells whether anything was lost, and which must then be as they were; and engines being
replayed. In hybrids only full-attention groups are healed: what a hit says of a window is too little to fill it, and a
miss may be the window's, in which case the index knows a copy too few until the blocks are stored again. Where the kind
of a group is not known, a miss says nothing. Blocks under recomputed names are settled and removed but not added: the
engine's own hash of them, by which it will announce their end, is not known.

Bounded: requests awaited (the oldest is given up), their keys, kept only for engines that may need healing, and the
removals heard of meanwhile (a request older than those remembered heals nothing).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvatlas_common.findings import Finding
from kvatlas_common.fleet import Sync
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.differences import Cause, Comparison, Repetitions, cause_of
from kvatlas_indexer.core.engine import Engine
from kvatlas_indexer.core.index import ENGINES_MAX, KvIndex
from kvatlas_indexer.core.match import Kind, Plan
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.slots import Place, Slot

RACE_S = 0.5
"""The last events of a request that ended so long ago may not have been applied when the next one was looked up."""


class Healed(StrEnum):
    """What became of a block."""

    SETTLED = "settled"  # no longer doubtful
    ADDED = "added"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class HealingLimits:
    awaited_max: int = 65_536  # requests whose end is awaited
    keys_max: int = 4_000_000  # block keys of all of them, at 8 bytes
    removals_max: int = 16_384  # per engine: blocks removed while requests are awaited
    awaited_s: float = 600.0  # its router is gone, or its answer so old that it says nothing any more


@dataclass(slots=True)
class _Awaited:
    """A request on its way. `known`: blocks the index itself predicts at its routing; `since`: when that was, counted.

    `held`: of each slot these rest on, its copies of each block then (at most 255).
    """

    engine: Engine
    at: float
    since: int
    predicted: int
    known: int
    profile: str
    block_size: int
    exact: bool
    marks: tuple[int, ...]
    neighbours: bool
    keys: array[int] | None
    held: list[tuple[Slot, bytes]]
    open: int = 1  # requests with this id: of more than one, answers cannot be told apart
    ambiguous: bool = False


@dataclass(slots=True)
class _Traffic:
    """What goes on at one engine."""

    awaited: int = 0
    watching: int = 0  # of these, the ones that may heal
    latest: int = 0  # the last request routed there
    ended_at: float = float("-inf")
    removed: OrderedDict[int, int] = field(default_factory=OrderedDict)  # block -> when, counted; latest last
    forgotten: int = 0  # removals up to then may not be remembered


class Healing:
    """Of one shard: `observe` is told everything, what concerns engines of other shards is passed over.

    Not thread-safe: the event loop of the index owns it. `now` in seconds, of any clock.
    """

    def __init__(
        self,
        index: KvIndex,
        *,
        on_finding: Callable[[EngineId | None, Finding], None],
        limits: HealingLimits | None = None,
    ) -> None:
        self.differences: Counter[Cause] = Counter()
        """Comparable requests predicted otherwise than reported, by cause."""
        self.healed: Counter[Healed] = Counter()
        """Blocks, per cache group."""
        self._index = index
        self._residency: Residency = index.residency
        self._on_finding = on_finding
        self._limits = limits or HealingLimits()
        self.repetitions = Repetitions()
        self._count = 0  # of requests routed: the clock of everything here that has an order
        self._awaited: OrderedDict[str, _Awaited] = OrderedDict()  # oldest first
        self._keys = 0
        self._traffic: dict[EngineId, _Traffic] = {}
        index.residency.on_removed = self._on_removed

    @property
    def awaited(self) -> int:
        return len(self._awaited)

    def observe(self, observation: Observation, now: float) -> bool:
        """Whether the index has changed."""
        match observation:
            case Routed():
                self._on_routed(observation, now)
            case Finished():
                return self._on_finished(observation, now)
            case FirstToken():
                pass
        return False

    # -- requests under way --------------------------------------------------------------------------------------------

    def _on_routed(self, routed: Routed, now: float) -> None:
        before = self._take(routed.request_id)
        self._give_up(now)
        engine, view = self._index.engine(routed.engine), self._index.fleet().engines.get(routed.engine)
        if engine is None or view is None or view.profile is None or not view.block_size:
            return
        keys = routed.keys.get(view.profile)
        if keys is None:
            return
        self._count += 1
        traffic = self._traffic_of(engine.id)
        neighbours = traffic.awaited > 0 or now - traffic.ended_at < RACE_S
        plan = Plan([engine.groups()])
        masks = self._residency.masks(keys) if plan.needs_all else self._residency.leading_masks(keys)
        known = sum(plan.match(masks).blocks().values())
        heals = _may_be_wrong_for_good(engine)
        awaited = self._awaited[routed.request_id] = _Awaited(
            engine,
            now,
            self._count,
            routed.predicted_cached_tokens,
            known,
            view.profile,
            view.block_size,
            engine.sync is Sync.EXACT,
            _marks(engine),
            neighbours,
            array("Q", keys) if heals else None,
            self._held(engine, keys[: known + engine.drop_last_blocks]) if heals and known else [],
        )
        if before is not None and before.engine is engine:
            awaited.open, awaited.ambiguous = before.open + 1, True
        traffic.awaited += 1
        traffic.watching += heals
        traffic.latest = self._count
        self._keys += len(keys) if heals else 0

    def _held(self, engine: Engine, keys: Sequence[int]) -> list[tuple[Slot, bytes]]:
        """Per slot of the full-attention groups that holds any of these blocks, its copies of each."""
        any_of_them = 0
        for mask in self._residency.masks(keys):
            any_of_them |= mask
        groups = _full_groups(engine, self._residency)
        slots = [slot for slot in self._residency.slots(engine.id) if slot.group in groups and slot.bit & any_of_them]
        return [(slot, bytes(min(n, 255) for n in self._residency.copies(slot, keys))) for slot in slots]

    def _take(self, request_id: str) -> _Awaited | None:
        awaited = self._awaited.pop(request_id, None)
        if awaited is not None:
            traffic = self._traffic_of(awaited.engine.id)
            traffic.awaited -= 1
            if awaited.keys is not None:
                self._keys -= len(awaited.keys)
                traffic.watching -= 1
                if not traffic.watching:
                    traffic.removed.clear()
        return awaited

    def _give_up(self, now: float) -> None:
        limits = self._limits
        while self._awaited:
            oldest = next(iter(self._awaited))
            fits = len(self._awaited) < limits.awaited_max and self._keys < limits.keys_max
            if fits and now - self._awaited[oldest].at < limits.awaited_s:
                return
            self._take(oldest)

    def _traffic_of(self, engine: EngineId) -> _Traffic:
        traffic = self._traffic.get(engine)
        if traffic is None:
            if len(self._traffic) >= ENGINES_MAX:
                self._traffic = {e: t for e, t in self._traffic.items() if t.awaited}
            traffic = self._traffic[engine] = _Traffic()
        return traffic

    def _on_removed(self, engine: EngineId, keys: Iterable[int]) -> None:
        """The residency is told that an engine holds a copy less of these."""
        traffic = self._traffic.get(engine)
        if traffic is None or not traffic.watching:
            return
        removed, oldest = traffic.removed, next(iter(self._awaited.values())).since
        for key in keys:
            removed[key] = self._count
            removed.move_to_end(key)
        while removed and (len(removed) > self._limits.removals_max or next(iter(removed.values())) < oldest):
            _, traffic.forgotten = removed.popitem(last=False)

    def _was_removed(self, awaited: _Awaited, key: int) -> bool:
        """Whether the engine may have removed a block since the request was routed."""
        traffic = self._traffic_of(awaited.engine.id)
        return max(traffic.forgotten, traffic.removed.get(key, 0)) >= awaited.since

    # -- what their ends tell ------------------------------------------------------------------------------------------

    def _on_finished(self, finished: Finished, now: float) -> bool:
        awaited = self._awaited.get(finished.request_id)
        if awaited is None:
            return False
        if awaited.engine.id == finished.engine and awaited.open > 1:
            awaited.open -= 1
            return False
        traffic = self._traffic_of(awaited.engine.id)
        changed = (
            awaited.engine.id == finished.engine
            and not awaited.ambiguous
            and finished.comparable
            and finished.outcome is Outcome.OK
            and finished.cached_tokens is not None
            and self._index.engine(finished.engine) is awaited.engine
            and self._judge(awaited, finished.cached_tokens, traffic)
        )
        traffic.ended_at = now
        self._take(finished.request_id)
        return changed

    def _judge(self, awaited: _Awaited, cached_tokens: int, traffic: _Traffic) -> bool:
        engine, marks = awaited.engine, _marks(awaited.engine)
        compared = Comparison(
            engine=engine.id,
            predicted=awaited.predicted,
            known=awaited.known * awaited.block_size,
            actual=cached_tokens,
            block_size=awaited.block_size,
            exact=awaited.exact and engine.sync is Sync.EXACT,
            reset=marks[:2] != awaited.marks[:2],
            neighbours=awaited.neighbours or traffic.latest > awaited.since,
            tiered=engine.tiered,
            dropped=engine.drop_last_blocks,
        )
        if (cause := cause_of(compared)) is not None:
            self.differences[cause] += 1
        if (finding := self.repetitions.add(compared)) is not None:
            self._on_finding(engine.id, finding)
        if awaited.keys is None or marks != awaited.marks or not _may_be_wrong_for_good(engine):
            return False
        view = self._index.fleet().engines.get(engine.id)
        if view is None or view.profile != awaited.profile:
            return False
        return self._heal(awaited, awaited.keys, cached_tokens // awaited.block_size)

    # -- healing -------------------------------------------------------------------------------------------------------

    def _heal(self, awaited: _Awaited, keys: array[int], hit: int) -> bool:
        engine = awaited.engine
        changed = False
        for group in _full_groups(engine, self._residency):
            changed = self._confirm(awaited, group, keys[:hit]) or changed
        predicted = awaited.predicted // awaited.block_size
        if hit < awaited.known <= predicted:
            changed = self._miss(awaited, keys, hit) or changed
        return changed

    def _confirm(self, awaited: _Awaited, group: int, keys: Sequence[int]) -> bool:
        """The engine held these in this group: they are no longer doubtful, and known."""
        engine, found = awaited.engine, self._residency.places(awaited.engine.id)
        places = [(medium, found[group, medium]) for medium in Medium if (group, medium) in found]
        certain = sum(place.live.bit for _, place in places)
        doubtful: dict[Medium, list[int]] = {}
        unknown: list[int] = []
        for key, mask in zip(keys, self._residency.masks(keys), strict=True):
            if mask & certain or self._was_removed(awaited, key):
                continue
            nearest = next((medium for medium, place in places if mask & place.doubt_mask), None)
            (unknown if nearest is None else doubtful.setdefault(nearest, [])).append(key)
        for medium, settled in doubtful.items():
            self._residency.hold(engine.id, group, medium, settled)
            self.healed[Healed.SETTLED] += len(settled)
        if not unknown or not self._may_add(engine, found.get((group, Medium.GPU))):
            return bool(doubtful)
        self._residency.hold(engine.id, group, Medium.GPU, unknown)
        self.healed[Healed.ADDED] += len(unknown)
        return True

    def _may_add(self, engine: Engine, place: Place | None) -> bool:
        return engine.naming.reproduces and (place is None or place.live.blocks < self._index.rules.bounds.blocks_max)

    def _miss(self, awaited: _Awaited, keys: array[int], hit: int) -> bool:
        """The engine did not hold the block after the hit: the copies of then are taken from every place that had it.

        Speculative decoding cuts the hit short; where nothing is left of it, it does not tell which block was missing.
        """
        engine = awaited.engine
        dropped = engine.drop_last_blocks
        first_missing = hit + dropped
        kinds = {rule.kind for rule in engine.rules.values()}
        if (dropped and not hit) or Kind.UNKNOWN in kinds or self._was_removed(awaited, keys[first_missing]):
            return False
        key, gone = [keys[first_missing]], False
        for slot, copies in awaited.held:
            if not self._residency.is_live(slot) or first_missing >= len(copies):
                continue
            for _ in range(min(copies[first_missing], *self._residency.copies(slot, key))):
                self._residency.remove(engine.id, slot.group, slot.medium, key)
                gone = True
        self.healed[Healed.REMOVED] += gone
        return gone


def _may_be_wrong_for_good(engine: Engine) -> bool:
    """Whether neither the next message nor a replay would show what the index has of it to be right after all."""
    if engine.sync is not Sync.INEXACT:
        return False
    return engine.stream.lost or (engine.connected and engine.stream.sync is Sync.EXACT)


def _marks(engine: Engine) -> tuple[int, ...]:
    """Change whenever what was held before says nothing of what is held now: epoch, clears, losses."""
    return engine.epoch, engine.counts["cleared"], engine.counts["loss"]


def _full_groups(engine: Engine, residency: Residency) -> set[int]:
    """Groups known for full attention; one that has been stored to is, unless its kind was told to be another."""
    groups = {group for group, _ in residency.places(engine.id)} | engine.rules.keys()
    return {group for group in groups if group not in engine.rules or engine.rules[group].kind is Kind.FULL}
