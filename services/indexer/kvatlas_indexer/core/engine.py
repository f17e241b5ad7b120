"""One engine of the index: its messages in order (`Stream`), its blocks named (`Naming`), its residency written.

The stream decides *what* happens, this module makes it happen: effects that concern the index are performed here, those
that need the network (a replay) are returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvatlas_common.events.types import (
    BlockRemoved,
    BlockStored,
    EventBatch,
    RejectedEvent,
    Rejection,
    between_clears,
    with_removals_joined,
)
from kvatlas_common.findings import Code, Finding
from kvatlas_common.fleet import Sync
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.effects import (
    Apply,
    BeginEpoch,
    BuildAgain,
    CancelReplay,
    Doubt,
    DropDoubtful,
    Duplicate,
    Effect,
    Message,
    ReplayEnd,
    RequestReplay,
)
from kvatlas_indexer.core.match import EngineGroups, GroupRule, Kind
from kvatlas_indexer.core.naming import Mode, Naming
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.stream import Stream

GROUPS_MAX = 64
RESTARTS_SUSPECT, RESTARTS_WITHIN_S, RESTARTS_OVER_S = 4, 10.0, 30.0
"""So many restarts within so many seconds are no restarts: two publishers speak under one name. Until there has been
none for a while."""
DOUBTS_PER_TTL = 8
"""A stream that loses messages all the time is put in doubt so often while a doubtful entry lives, not at each loss."""
_MEDIA = frozenset(Medium)
Network: TypeAlias = RequestReplay | CancelReplay


@dataclass(frozen=True, slots=True)
class Bounds:
    blocks_max: int = 8_000_000  # per engine, group and medium; beyond, they become doubtful, and those before them go
    doubt_ttl_s: float = 600.0  # how long doubtful entries stay usable


class Engine:
    """Not thread-safe. Time is an argument."""

    def __init__(
        self,
        engine: EngineId,
        residency: Residency,
        stream: Stream,
        naming: Naming,
        *,
        bounds: Bounds | None = None,
        reannounces: bool = False,
        drop_last_blocks: int = 0,
        delays: Durations | None = None,
        on_emptied: Callable[[EngineId], None] = lambda engine: None,
    ) -> None:
        self.id = engine
        self._on_emptied = on_emptied
        self.stream = stream
        self.naming = naming
        self.rules: dict[int, GroupRule] = {}
        self.counts: Counter[str] = Counter()
        """What became of what it said. Of messages: batch (applied), duplicate. Of events: event-stored, event-removed,
        cleared, or a rejection. Of blocks: stored, removed, removed-unknown. And: replay, replay-<end>, loss, restart.
        """
        self.connected = True
        """False while its publisher, which is dialled, is not connected: whatever it publishes is lost."""
        self.epoch = 0  # counts the lives of its cache, and of what is told of it
        self.tiered = False  # it has spoken of other media than the gpu
        self.heard_at: float | None = None
        self.lag_s = 0.0  # from the engine's `ts` of the last message to its being applied
        self._delays = delays or Durations()  # of all engines, from the batch's `ts` to its being taken up
        self._residency = residency
        self._bounds = bounds or Bounds()
        self._reannounces = reannounces
        self.drop_last_blocks = drop_last_blocks
        self._doubted_at = float("-inf")
        self._due: frozenset[Medium] = frozenset()  # what is to be put in doubt when the time has come
        self._restarts: list[float] = []
        self.odd: Finding | None = None  # a lasting reason not to be exact
        self.replay_failed = ""  # how the last replay ended, unless well
        self._findings: list[Finding] = []
        self._partitions = 1
        self._ahead: dict[int, int] = {}  # partition -> the last message it has already, while behind ones catch up

    # -- what the index asks -------------------------------------------------------------------------------------------

    @property
    def sync(self) -> Sync:
        return self.status[0]

    @property
    def inexact_reason(self) -> str:
        """Empty unless it is inexact."""
        return self.status[1]

    @property
    def status(self) -> tuple[Sync, str]:
        sync = self.stream.sync
        if sync is Sync.EXACT:
            reason = self._why_inexact()
            return (Sync.INEXACT, reason) if reason else (sync, "")
        return sync, self.stream.inexact_reason

    def _why_inexact(self) -> str:
        """What keeps it from being exact although every message has been applied."""
        if not self.connected:
            return "its event stream is not connected: what it publishes is missed"
        if self.odd is not None:
            return self.odd.wrong
        if self._due or self._residency.in_doubt(self.id):
            return "some of what it holds is in doubt"
        if self.tiered and not self.stream.complete:
            return "what it holds beside the gpu is not known: messages were lost before the last clear"
        if self._reannounces:
            return "it announces blocks again that it merely hit: copies cannot be counted"
        if self.naming.unnamed:
            return "some of its blocks cannot be named: what they follow was never announced"
        if self.naming.mode is Mode.RECOMPUTE and self.naming.blind_to_extras:
            return "its events carry no extra keys and its hashes cannot be reproduced: salted prompts look unsalted"
        return ""

    def groups(self) -> EngineGroups:
        size = self.naming.block_size or 1
        exact = self.sync is Sync.EXACT
        places = self._residency.places(self.id)
        return EngineGroups(self.id, exact, places, self.rules, size, self.drop_last_blocks)

    def blocks(self) -> dict[Medium, int]:
        return self._residency.blocks(self.id)

    def take_findings(self) -> list[Finding]:
        findings, self._findings = self._findings, []
        return findings

    # -- what happens to it --------------------------------------------------------------------------------------------

    def on_attached(self, now: float) -> list[Network]:
        return self._perform(self.stream.on_attached(now), now)

    def on_message(self, message: Message, now: float) -> list[Network]:
        self.heard_at = now
        return self._perform(self.stream.on_message(message, now), now)

    def on_connection(self, up: bool, now: float) -> list[Network]:
        self.connected = up
        return self.on_returned(now) if up else []

    def on_replayed(self, message: Message, now: float) -> list[Network]:
        return self._perform(self.stream.on_replayed(message, now), now)

    def on_replay_end(self, end: ReplayEnd, now: float) -> list[Network]:
        self.counts[f"replay-{end}"] += 1
        self.replay_failed = "" if end is ReplayEnd.COMPLETE else f"it was {end}"
        return self._perform(self.stream.on_replay_end(end, now), now)

    def on_process_start(self, start_s: float, now: float) -> list[Network]:
        return self._perform(self.stream.on_process_start(start_s, now), now)

    def on_returned(self, now: float) -> list[Network]:
        return self._perform(self.stream.on_returned(now), now)

    def on_tick(self, now: float) -> list[Network]:
        self._residency.expire_doubts(now - self._bounds.doubt_ttl_s, self.id)
        if self._due:
            self._doubt(self._due, now)
        if self.odd is not None and self.odd.code is Code.NAME_CLAIMED_TWICE and self._is_alone_again(now):
            self.odd = None
            return self._perform(self.stream.on_unusable("two publishers have used its name", now), now)
        effects = self.stream.on_tick(now)
        if any(isinstance(effect, CancelReplay) for effect in effects):
            self.replay_failed = "it stalled"
        return self._perform(effects, now)

    def forget(self) -> None:
        """It is gone: nothing of it stays."""
        self._residency.clear(self.id)
        self._residency.bury(self.naming.forget_names())

    def configure(self, *, reannounces: bool, drop_last_blocks: int) -> None:
        """What the configuration says of it."""
        if (reannounces, drop_last_blocks) != (self._reannounces, self.drop_last_blocks):
            self._reannounces, self.drop_last_blocks = reannounces, drop_last_blocks
            self._residency.version += 1

    def pass_over(self, partitions: int, ahead: Mapping[int, int]) -> None:
        """Some partitions of the store already have messages that are to be applied again: up to which ones."""
        self._partitions, self._ahead = partitions, dict(ahead)

    def begins_anew_elsewhere(self) -> None:
        """A copy of what it holds is about to be made anew: where the old copy stood means nothing any more."""
        self.epoch += 1

    # -- effects -------------------------------------------------------------------------------------------------------

    def _perform(self, effects: Sequence[Effect], now: float) -> list[Network]:
        network: list[Network] = []
        for effect in effects:
            match effect:
                case Apply(message):
                    if self._ahead:
                        self._ahead = {p: last for p, last in self._ahead.items() if last >= message.seq}
                    if follows := self._apply(message.batch, now):
                        network += self._perform(follows, now)
                case BeginEpoch(reason):
                    self._begin_epoch(reason, now)
                case Doubt(reason):
                    self.counts["loss"] += 1
                    self.naming.lose_track()
                    self._doubt(_MEDIA, now)
                    self._findings.append(Finding(Code.LOSS, reason))
                case BuildAgain():
                    self.naming.lose_track()
                    self.odd = None
                    self._due = frozenset()
                    self._residency.doubt(self.id, now)
                    self._residency.bury(self.naming.forget_names())
                case DropDoubtful():
                    self._due = frozenset()
                    self._residency.expire_doubts(float("inf"), self.id)
                case Duplicate():
                    self.counts["duplicate"] += 1
                case RequestReplay():
                    self.counts["replay"] += 1
                    network.append(effect)
                case CancelReplay():
                    network.append(effect)
        return network

    def _apply(self, batch: EventBatch, now: float) -> list[Effect]:
        self.counts["batch"] += 1
        self.lag_s = max(0.0, now - batch.ts)
        self._delays.add_between(batch.ts, now)
        self._learn_groups(batch)
        for cleared, events in between_clears(batch.events):
            if cleared:
                self._clear(now)
            self._apply_events(events, now)
        return self._reject(batch.rejected, now) if batch.rejected else []

    def _apply_events(self, events: Sequence[BlockStored | BlockRemoved], now: float) -> None:
        """Names are learned from all of them first: a window group may be announced before the group that tells."""
        size = self.naming.block_size
        findings, renamed = self.naming.study(events, self.rules)
        self._findings += findings
        if self.naming.block_size != size:
            self._residency.version += 1
        if renamed:
            self._residency.rename(self.id, renamed)
        for event in with_removals_joined(events):
            if isinstance(event, BlockStored):
                self._store(event, now)
            else:
                self._remove(event)
        self.counts["event-removed"] += [*map(type, events)].count(BlockRemoved)

    def _learn_groups(self, batch: EventBatch) -> None:
        """The kind of a group comes with its stores; those of offload tiers may leave it out."""
        for event in batch.events:
            if type(event) is not BlockStored:
                continue
            known = self.rules.get(event.group)
            if known is not None and (event.kind is None or (event.kind, event.window) == (known.name, known.window)):
                continue
            if known is None and len(self.rules) >= GROUPS_MAX:
                self.odd = Finding(Code.UNKNOWN_GROUP_KIND, f"it has more than {GROUPS_MAX} cache groups")
                return
            rule = self.rules[event.group] = GroupRule.of(event.kind, event.window)
            self._residency.version += 1
            if rule.kind is Kind.UNKNOWN:
                kind = (rule.name or "")[:64]
                self._is_odd(
                    Code.UNKNOWN_GROUP_KIND, f"cache group {event.group} is of kind {kind!r}, whose hits are not known"
                )

    def _store(self, event: BlockStored, now: float) -> None:
        size = event.block_size
        if size and event.medium is Medium.GPU:
            if self.naming.block_size is None:
                self.naming.learn_block_size(size)
            elif size != self.naming.block_size and self.odd is None:
                self._is_odd(Code.MIXED_BLOCK_SIZES, f"it has blocks of {self.naming.block_size} and of {size} tokens")
        self.tiered = self.tiered or event.medium is not Medium.GPU
        keys = self._behind(self.naming.stored(event))
        self.counts["event-stored"] += 1
        self.counts["stored"] += len(keys)
        if not keys:
            return
        write = self._residency.hold if self._reannounces else self._residency.store
        write(self.id, event.group, event.medium, keys, self.naming.key_before(event))
        place = self._residency.place(self.id, event.group, event.medium)
        if place is not None and place.live.blocks > self._bounds.blocks_max:
            self._residency.doubt(self.id, now, [event.medium])
            self._residency.keep_doubts(place, 1)
            most = self._bounds.blocks_max
            self._is_odd(Code.TOO_MANY_BLOCKS, f"more than {most} blocks on {event.medium}: the oldest are aging out")

    def _remove(self, event: BlockRemoved) -> None:
        self.tiered = self.tiered or event.medium is not Medium.GPU
        keys = self._behind(self.naming.removed(event))
        self.counts["removed"] += len(keys)
        missing = self._residency.remove(self.id, event.group, event.medium, keys)
        self.counts["removed-unknown"] += missing

    def _behind(self, keys: Sequence[int]) -> Sequence[int]:
        if not self._ahead:
            return keys
        return [key for key in keys if key % self._partitions not in self._ahead]

    def _clear(self, now: float) -> None:
        """The gpu's pool is empty; whether the other tiers went with it, the event does not say: they are in doubt."""
        self.counts["cleared"] += 1
        self._on_emptied(self.id)
        self._residency.clear(self.id, [Medium.GPU])
        self._due -= {Medium.GPU}
        self._ahead = {}  # from nothing on, every partition applies the same
        if self._residency.places(self.id):
            self._doubt(_MEDIA - {Medium.GPU}, now)
            self.odd = self.odd or Finding(Code.INEXACT, _CLEARED_BESIDE)
        else:
            self._due = frozenset()
            self._residency.bury(self.naming.forget_names())

    def _doubt(self, media: frozenset[Medium], now: float) -> None:
        """Doubtful generations are bounded, and none may be forgotten before its time: so they are not begun too fast.

        Until the next is begun, what has been stored since the last one is not told from what may be wrong.
        """
        if now - self._doubted_at < self._bounds.doubt_ttl_s / DOUBTS_PER_TTL:
            self._due |= media
            return
        self._doubted_at, self._due = now, self._due - media
        self._residency.doubt(self.id, now, media)

    def _reject(self, rejected: Sequence[RejectedEvent], now: float) -> list[Effect]:
        told: set[Rejection] = set()
        effects: list[Effect] = []
        for event in rejected:
            self.counts[event.rejection] += 1
            if event.rejection not in told:
                told.add(event.rejection)
                self._findings.append(Finding(Code(event.rejection), event.why, change=_REPORT))
                if event.rejection is Rejection.UNKNOWN_MEDIUM:
                    self.odd = Finding(Code.INEXACT, f"{event.why}: what it holds there is not known")
            if event.lossy and not effects:
                effects = self.stream.on_unusable(f"an event could not be read: {event.why}", now)
        return effects

    def _is_alone_again(self, now: float) -> bool:
        return not self._restarts or now - self._restarts[-1] > RESTARTS_OVER_S

    def _is_odd(self, code: Code, wrong: str, cause: str = "", change: str = "") -> None:
        self.odd = Finding(code, wrong, cause, change)
        self._findings.append(self.odd)

    def _begin_epoch(self, reason: str, now: float) -> None:
        self.counts["restart"] += 1
        self._on_emptied(self.id)
        self.epoch += 1
        self._ahead = {}
        self._residency.clear(self.id)
        self._residency.bury(self.naming.forget_names())
        self.naming.begin_epoch()
        self.rules.clear()
        self.odd = None
        self._due, self._doubted_at = frozenset(), float("-inf")
        self._findings.append(Finding(Code.RESTART, reason))
        self._restarts = [*self._restarts[1 - RESTARTS_SUSPECT :], now]
        if len(self._restarts) == RESTARTS_SUSPECT and now - self._restarts[0] < RESTARTS_WITHIN_S:
            self._is_odd(Code.NAME_CLAIMED_TWICE, _TWO_PUBLISHERS, "another engine has its topic", _OWN_TOPIC)


_CLEARED_BESIDE = "a clear empties the gpu, and does not say whether the other media went with it"
_TWO_PUBLISHERS = "its messages keep beginning again: two publishers seem to use its name"
_OWN_TOPIC = 'give each engine a "topic" of its own in --kv-events-config: kv@<its host:port>@<its model>'
_REPORT = "report it with the engine's version: what its events say is not understood here"
