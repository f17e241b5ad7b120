"""What the engines hold, against what the index says they hold. Pure.

The load goes on while the checker looks, so a table read a moment ago may be true no more. Three tables of an engine
are taken: one, another after the time events need (`SETTLE_S`), and a third when the index has answered. Only blocks
of which all three say the same (so many copies, or none) are compared: for them there is one right answer. Blocks that
nobody holds any more are asked for as well as those somebody does: an index that never forgets is wrong too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Table = Mapping[int, int]
"""Block key -> copies; a key that is not in it has none."""

Arrivals = Mapping[int, int]
"""Block key -> a number that stays as long as the engine holds the block without a break."""

SETTLE_S = 0.2
EXACT = "exact"
GONE_MAX = 1_000


def settled(tables: Sequence[Table], asked: Iterable[int]) -> dict[int, int]:
    """Of the blocks asked for, those of which all tables say the same, and what they say (0: not held)."""
    first, *others = tables
    found: dict[int, int] = {}
    for key in asked:
        copies = first.get(key, 0)
        if all(table.get(key, 0) == copies for table in others):
            found[key] = copies
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Blocks by how the index is wrong about them. `compared`: all that were looked at."""

    compared: int = 0
    missing: int = 0  # held, and the index says they are not
    left: int = 0  # not held, and the index says they are
    miscounted: int = 0  # held, in another number of copies

    def __bool__(self) -> bool:
        return bool(self.missing or self.left or self.miscounted)

    def __str__(self) -> str:
        wrong = {"missing": self.missing, "left over": self.left, "miscounted": self.miscounted}
        told = ", ".join(f"{count} {name}" for name, count in wrong.items() if count)
        return f"{told or 'none wrong'} of {self.compared} blocks"


def compare(true: Table, said: Table) -> Difference:
    """`true`: settled copies of every block compared, 0 included. `said`: copies by the index, all kinds of entries."""
    return Difference(
        compared=len(true),
        missing=sum(1 for key, copies in true.items() if copies and not said.get(key)),
        left=sum(1 for key, copies in true.items() if not copies and said.get(key)),
        miscounted=sum(1 for key, copies in true.items() if copies and said.get(key) and said[key] != copies),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """One engine as one shard has it. `matched`, `held`: blocks of its table that a lookup finds, of all there are."""

    shard: str
    engine: str
    sync: str
    reason: str = ""
    difference: Difference = Difference()
    matched: int = 0
    held: int = 0

    @property
    def right(self) -> bool:
        """It says everything that is so, and nothing that is not."""
        return not self.difference and self.matched == self.held

    @property
    def exact(self) -> bool:
        return self.right and self.sync == EXACT

    @property
    def honest(self) -> bool:
        """It does not call exact what is not."""
        return self.right or self.sync != EXACT

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        found = f", a lookup finds {self.matched} of {self.held}" if self.matched != self.held else ""
        return f"{self.engine} by {self.shard}: {self.sync}{why}, {self.difference}{found}"


@dataclass(frozen=True, slots=True)
class Look:
    """The index at one moment: `at` is when the tables were taken that it was held against (monotonic)."""

    at: float
    verdicts: tuple[Verdict, ...] = ()
    silent: tuple[str, ...] = ()  # who did not answer, shards and engines, and why

    @property
    def exact(self) -> bool:
        return not self.silent and bool(self.verdicts) and all(v.exact for v in self.verdicts)

    @property
    def honest(self) -> bool:
        return not self.silent and bool(self.verdicts) and all(v.honest for v in self.verdicts)

    def problems(self) -> list[str]:
        return [f"no answer from {name}" for name in self.silent] + [str(v) for v in self.verdicts if not v.exact]

    def sync(self) -> dict[str, str]:
        """Engine -> its state, the worst that any shard tells."""
        order = ("exact", "inexact", "syncing", "unknown", "not known")
        worst: dict[str, str] = {}
        for verdict in self.verdicts:
            worst[verdict.engine] = max(worst.get(verdict.engine, EXACT), verdict.sync, key=order.index)
        return worst


@dataclass(slots=True)
class Gone:
    """Blocks that some engine held once, so that the index can be asked whether it forgot them. Bounded: the latest."""

    keys: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _held: frozenset[int] = frozenset()

    def saw(self, tables: Iterable[Table]) -> None:
        held = frozenset(key for table in tables for key in table)
        for key in sorted(self._held - held):
            self.keys[key] = None
        for key in held & self.keys.keys():
            del self.keys[key]
        while len(self.keys) > GONE_MAX:
            self.keys.popitem(last=False)
        self._held = held


@dataclass(slots=True)
class Kept:
    """Blocks an engine has held without a break (`Arrivals` tell) since a moment at which the index knew of them.

    The index may lose sight of what an engine stores; what it knew and nothing contradicted, it must still say.
    """

    blocks: dict[str, dict[int, int]] = field(default_factory=dict)  # engine -> block key -> when it came

    @classmethod
    def since(cls, arrivals: Mapping[str, Arrivals], said: Mapping[str, Mapping[str, Table]]) -> Kept:
        """`said`: shard -> engine -> what it says."""
        return cls(
            {
                engine: {k: n for k, n in came.items() if all(s.get(engine, {}).get(k) for s in said.values())}
                for engine, came in arrivals.items()
            }
        )

    def saw(self, arrivals: Mapping[str, Arrivals]) -> None:
        for engine, came in arrivals.items():
            if engine in self.blocks:
                self.blocks[engine] = {k: n for k, n in self.blocks[engine].items() if came.get(k) == n}

    def forget(self, engine: str) -> None:
        """Its cache has ended."""
        self.blocks.pop(engine, None)

    def share_said(self, said: Mapping[str, Mapping[str, Table]]) -> float:
        """Of all such blocks, the share still said, by the shard that says the fewest; NaN if there are none."""
        every = [(engine, key) for engine, keys in self.blocks.items() for key in keys]
        if not every or not said:
            return float("nan")
        return min(sum(1 for e, k in every if s.get(e, {}).get(k)) / len(every) for s in said.values())
