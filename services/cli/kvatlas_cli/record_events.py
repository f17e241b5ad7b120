"""The event messages of the engine being recorded, in the order of their arrival, and when they have all arrived.

An engine publishes what a request changed beside its answer, not before it: the last messages may come after the last
token. They have come when as many tokens have been stored as the request computed whole blocks of, and then nothing
more for a moment. Where that cannot be reckoned (an engine that does not say how much it computed), a longer silence
has to do.

Messages are numbered. Those before the first one heard may be fetched from the engine's replay endpoint; later ones
that are missing are lost, and counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from kvatlas_common.events.decode import decode_batch, decode_seq
from kvatlas_common.events.types import AllBlocksCleared, BlockStored, EventBatch, MalformedBatch
from kvatlas_common.words import Medium
from kvatlas_indexer.adapters.zmq_source import Origin

EARLY_MAX = 100_000  # messages kept while history is being fetched

_GroupOfRank: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `quiet_s`: silence, once what is known to be due has come. `unsure_s`: silence, where nothing is known to be due.
    `due_s`: at most, for what is due, and for silence. `first_s`: for the first message of a rank to come at all.
    """

    quiet_s: float = 0.05
    unsure_s: float = 0.25
    due_s: float = 3.0
    first_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of the stream: messages so far, and the tokens stored on the gpu by then per rank and group."""

    count: int
    stored: Counter[_GroupOfRank]


@dataclass(slots=True)
class Heard:
    """What has come in. `first`, `last`: sequence numbers per rank."""

    count: int = 0
    lost: int = 0
    restarts: int = 0
    malformed: int = 0
    foreign: int = 0
    clears: int = 0
    topic: bytes | None = None
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)


class EventLog:
    """`write(t, frames)` is called for every message of the first topic heard, but not before `begin`.

    Until then messages are kept, so that history can be put before them.
    """

    def __init__(self, write: Callable[[float, Sequence[bytes]], None], clock: Callable[[], float]) -> None:
        self.heard = Heard()
        self._write = write
        self._clock = clock
        self._early: list[tuple[float, list[bytes]]] | None = []
        self._stored: Counter[_GroupOfRank] = Counter()
        self._came = asyncio.Event()

    def on_message(self, origin: Origin, frames: list[bytes]) -> None:
        heard = self.heard
        if heard.topic is None and frames:
            heard.topic = frames[0]
        if not frames or frames[0] != heard.topic:
            heard.foreign += 1
            return
        heard.count += 1
        try:
            self._follow(origin, decode_seq(frames[1]), decode_batch(frames[2]))
        except (IndexError, MalformedBatch):
            heard.malformed += 1  # recorded all the same: how a decoder copes with it is for the audit to show
        self._keep(frames)
        self._came.set()

    def begin(self, history: Sequence[Sequence[bytes]] = ()) -> None:
        """From now on messages are written as they come, after `history` and those kept so far."""
        early, self._early = self._early or [], None
        now = self._clock()
        for frames in history:
            self._write(early[0][0] if early else now, frames)
        self.heard.count += len(history)
        for t, frames in early:
            self._write(t, frames)

    def mark(self) -> Mark:
        return Mark(self.heard.count, self._stored.copy())

    async def until_heard_of(self, rank: int, within_s: float) -> bool:
        """Whether a message of this rank has come in time."""
        return await self._until(lambda: rank in self.heard.last, within_s)

    async def until_settled(self, since: Mark, due_tokens: int, patience: Patience) -> bool:
        """Waits until all of a request's messages have come. False: what is due did not come, or no end was in sight.

        `due_tokens`: so many tokens at least have been computed in whole blocks since the mark; 0: not known.
        """
        if due_tokens and not await self._until(lambda: self._stored_since(since) >= due_tokens, patience.due_s):
            return False
        loop = asyncio.get_running_loop()
        ends_at, quiet_s = loop.time() + patience.due_s, patience.quiet_s if due_tokens else patience.unsure_s
        while loop.time() < ends_at:
            count = self.heard.count
            if not await self._until(lambda count=count: self.heard.count > count, quiet_s):  # type: ignore[misc]
                return True
        return False

    def _stored_since(self, mark: Mark) -> int:
        """Of the group that stored most: a sliding-window group may skip blocks, full attention never does."""
        return max((tokens - mark.stored[group] for group, tokens in self._stored.items()), default=0)

    async def _until(self, condition: Callable[[], bool], within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            return condition()
        return True

    def _keep(self, frames: list[bytes]) -> None:
        now = self._clock()
        if self._early is None:
            self._write(now, frames)
        elif len(self._early) < EARLY_MAX:
            self._early.append((now, frames))
        else:
            self.heard.lost += 1
            self.heard.count -= 1

    def _follow(self, origin: Origin, seq: int, batch: EventBatch) -> None:
        rank = origin.port_rank if batch.rank is None else batch.rank
        heard = self.heard
        expected = heard.last.get(rank, seq - 1) + 1
        heard.lost += max(seq - expected, 0)
        heard.restarts += seq < expected
        heard.first.setdefault(rank, seq)
        heard.last[rank] = seq
        for event in batch.events:
            if isinstance(event, BlockStored) and event.medium is Medium.GPU:
                self._stored[rank, event.group] += len(event.keys) * event.block_size
            elif isinstance(event, AllBlocksCleared):
                heard.clears += 1
