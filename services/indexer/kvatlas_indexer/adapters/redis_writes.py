"""What owners write to the shared store: present states of blocks, and how far each partition has come.

| found in the partition              | means                                            | so                      |
|-------------------------------------|--------------------------------------------------|-------------------------|
| a higher fence                      | the engine has another owner now                 | FENCED, nothing written |
| no state, or one that is `dirty`    | it was wiped, or a publication was broken off    | BEHIND: publish whole   |
| a turn before the last acknowledged | a fail-over lost writes                          | BEHIND: publish whole   |
| this very turn                      | the write was carried out, its answer lost       | OK, nothing written     |
| a later turn                        | a write from before, that came late              | BEHIND, nothing written |

A *turn* numbers the writes of one engine in one partition. Sequence numbers alone would not do: what is written between
two messages (a doubt that ended, a block healed) leaves them where they are, and a write that timed out may still be
carried out after a later one, when a stopped server goes on.

A small write is one script, all or nothing. A larger one, or a publication of everything, goes in parts, and the
partition is `dirty` from the first to the last: who takes the engine over in between must not trust it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_blocks import block_keys
from kvatlas_indexer.adapters.redis_client import RedisClient, Request
from kvatlas_indexer.adapters.redis_packing import Argument, bulk, command, head, key_array
from kvatlas_indexer.adapters.redis_scripts import Script
from kvatlas_indexer.core.projection import SlotWrite, Write

ATOMIC_MAX = 2048
"""Blocks in one script: it holds the server up for some 8 ms. Lua could unpack no more than 7,999."""
PART_MAX = 1024
ROUND_MAX = 16 * PART_MAX
"""Blocks under way at once: what is not yet answered is held in memory as bytes."""
TTL_JITTER = 0.1

_WRITE = Script.load("write")
_FENCE = Script.load("fence")
_FIXED = 11  # arguments of the script before those of the slots


class Outcome(Enum):
    """What became of a write, per partition."""

    OK = 0
    FENCED = 1
    BEHIND = 2


@dataclass(frozen=True, slots=True)
class Position:
    """Where an engine's stream stood: the last message applied. `ts` in seconds since the epoch."""

    epoch: int
    seq: int
    ts: float
    digest: int


@dataclass(frozen=True, slots=True)
class Flush:
    """One engine's write to one partition. `whole`: it is all the engine holds there."""

    write: Write
    fence: int
    position: Position
    whole: bool = False


@dataclass(slots=True)
class _Standing:
    """What the owner knows of a partition: the last turn acknowledged, and the last one used."""

    acked: int = -1
    turn: int = 0


@dataclass(slots=True)
class _Run:
    """A flush under way. `parts` are still to be sent."""

    index: int
    flush: Flush
    standing: _Standing
    parts: Iterator[list[SlotWrite]]
    mode: str
    after: bytes = b""
    ahead: list[list[SlotWrite]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def peek(self) -> list[SlotWrite] | None:
        if not self.ahead and (part := next(self.parts, None)) is not None:
            self.ahead.append(part)
        return self.ahead[0] if self.ahead else None


class RedisWrites:
    """The writing half of the store. One write of an engine at a time.

    `block_ttl_s`: how long entries stay that nobody writes again and no sweep renews; jittered.
    """

    def __init__(self, client: RedisClient, *, block_ttl_s: float, chance: Callable[[], float] = random.random) -> None:
        self._client = client
        self._ttl_s = block_ttl_s
        self._chance = chance
        self._blocks = [block_keys(client, partition) for partition in range(client.partitions)]
        self._standing: dict[tuple[EngineId, int], _Standing] = {}  # of the engines this shard owns
        client.know(_WRITE)

    async def write(self, flushes: Sequence[Flush]) -> list[Outcome]:
        """One outcome per flush. A write with no blocks only notes the position.

        Raises `StoreUnavailable`: what has been written by then is not known, and may be written again.
        """
        outcomes = [Outcome.OK for _ in flushes]
        waiting: list[_Run] = []
        for index, flush in enumerate(flushes):
            run = self._run(index, flush)
            if run is None:
                outcomes[index] = Outcome.BEHIND
            else:
                waiting.append(run)
        while waiting:
            sent, requests = self._fill(waiting)
            for run, replies in zip(sent, await self._client.round(requests), strict=True):
                outcomes[run.index] = self._note(run, replies)
            waiting = [r for r in waiting if outcomes[r.index] is Outcome.OK and r.peek() is not None]
        return outcomes

    async def raise_fence(self, engine: EngineId, fence: int) -> list[Position | None] | None:
        """Where each partition stands for an engine; None where that is nothing to build on. No lower fence can write
        from then on.

        None in place of the list: somebody else has a higher fence. Raises `StoreUnavailable`.
        """
        requests = [
            Request(p, [self._client.call(_FENCE, [self._state(engine, p)], [fence, self._state_ttl()])])
            for p in range(self._client.partitions)
        ]
        found: list[Position | None] = []
        replies = [reply for (reply,) in await self._client.round(requests)]
        if any(reply[0] for reply in replies):
            return None
        for partition, (_, turn, dirty, epoch, seq, ts, digest) in enumerate(replies):
            stood = int(turn or 0)
            self._standing[engine, partition] = _Standing(stood, stood)
            known = not dirty and epoch is not None
            found.append(Position(int(epoch), int(seq), float(ts), int(digest)) if known else None)
        return found

    async def check(self, engines: Collection[tuple[EngineId, int]]) -> dict[EngineId, list[Outcome]]:
        """How each partition stands for engines (and the fences they are held under) that have nothing to write.

        It keeps their states from expiring. Raises `StoreUnavailable`.
        """
        asked = list(engines)
        requests = []
        for partition in range(self._client.partitions):
            states = [self._state(engine, partition) for engine, _ in asked]
            data = [
                command("HMGET", state, "fence", "turn", "dirty") + command("EXPIRE", state, self._state_ttl())
                for state in states
            ]
            requests.append(Request(partition, data, 2 * len(asked)))
        found: dict[EngineId, list[Outcome]] = {engine: [] for engine, _ in asked}
        for partition, replies in enumerate(await self._client.round(requests) if asked else []):
            for (engine, fence), state in zip(asked, replies[::2], strict=True):
                found[engine].append(self._judged(self._standing.get((engine, partition)), fence, state))
        return found

    def forget(self, engine: EngineId) -> None:
        """This shard writes of it no more."""
        for partition in range(self._client.partitions):
            self._standing.pop((engine, partition), None)

    # -- within --------------------------------------------------------------------------------------------------------

    def _run(self, index: int, flush: Flush) -> _Run | None:
        at = flush.write.engine, flush.write.partition
        standing = self._standing.get(at)
        if standing is None:
            if not flush.whole:
                return None
            standing = self._standing[at] = _Standing()
        mode = "whole" if flush.whole else "normal"
        run = _Run(index, flush, standing, _parts(flush.write, whole=flush.whole), mode)
        run.after = b"".join(map(bulk, (self._state_ttl(), *_position(flush.position))))
        return run

    def _fill(self, waiting: Sequence[_Run]) -> tuple[list[_Run], list[Request]]:
        """As many parts as may be under way at once; at least one."""
        sent: list[_Run] = []
        requests: list[Request] = []
        room = ROUND_MAX
        for run in waiting:
            data: list[bytes] = []
            run.turns = []
            while (part := run.peek()) is not None and room > 0:
                run.ahead.clear()
                room -= max(1, sum(len(write.keys) for write in part))
                data.append(self._pack(run, part))
            if data:
                sent.append(run)
                requests.append(Request(run.flush.write.partition, data, len(data)))
        return sent, requests

    def _pack(self, run: _Run, part: Sequence[SlotWrite]) -> bytes:
        """One call of the script; it takes the next turn."""
        standing, write = run.standing, run.flush.write
        before = run.turns[-1] if run.turns else standing.acked
        standing.turn += 1
        run.turns.append(standing.turn)
        close = "1" if run.peek() is None else "0"
        ttl = round(self._ttl_s * (1 + TTL_JITTER * (2 * self._chance() - 1)))
        fixed: tuple[Argument, ...] = (run.flush.fence, standing.turn, before, run.mode, close, max(1, ttl))
        run.mode = "next"
        count = sum(len(slot.keys) for slot in part)
        blocks = self._blocks[write.partition]
        pieces = [
            head(3 + 1 + count + _FIXED + 3 * len(part)),
            b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % _WRITE.sha,
            bulk(1 + count),
            bulk(self._state(write.engine, write.partition)),
            *(blocks.bulks(key_array(slot.keys)) for slot in part),
            *map(bulk, fixed),
            run.after,
        ]
        for slot in part:
            pieces += (bulk(slot.number.to_bytes(4, "big")), bulk(len(slot.keys)), bulk(slot.copies))
        return b"".join(pieces)

    @staticmethod
    def _note(run: _Run, replies: Sequence[Any]) -> Outcome:
        for turn, (code, stood) in zip(run.turns, replies, strict=True):
            outcome = Outcome(code)
            if outcome is not Outcome.OK:
                run.standing.turn = max(run.standing.turn, stood)
                return outcome
            run.standing.acked = turn
        return Outcome.OK

    @staticmethod
    def _judged(standing: _Standing | None, fence: int, state: Sequence[bytes | None]) -> Outcome:
        held, turn, dirty = state
        if held is not None and int(held) > fence:
            return Outcome.FENCED
        if standing is None or held is None or dirty is not None or int(turn or 0) < standing.acked:
            return Outcome.BEHIND
        return Outcome.OK

    def _state(self, engine: EngineId, partition: int) -> bytes:
        return self._client.key(partition, f"s{engine}")

    def _state_ttl(self) -> int:
        """Never longer than that of the blocks written with it."""
        return max(1, int(self._ttl_s * (1 - TTL_JITTER)))


def _position(position: Position) -> tuple[int, int, float, int]:
    return position.epoch, position.seq, position.ts, position.digest


def _parts(write: Write, *, whole: bool) -> Iterator[list[SlotWrite]]:
    """In one, where that may be; otherwise in parts of at most `PART_MAX` blocks."""
    if len(write) <= (PART_MAX if whole else ATOMIC_MAX):
        yield [slot for slot in write.slots if len(slot.keys)]  # the script takes no slot without blocks
        return
    part: list[SlotWrite] = []
    room = PART_MAX
    for slot in write.slots:
        start = 0
        while start < len(slot.keys):
            taken = slice(start, start + room)
            keys = slot.keys[taken]
            part.append(SlotWrite(slot.number, keys, slot.copies[taken]))
            start, room = start + len(keys), room - len(keys)
            if not room:
                yield part
                part, room = [], PART_MAX
    if part:
        yield part
