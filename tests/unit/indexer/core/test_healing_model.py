"""Healing, held against its rules written down naively for one engine that is inexact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.indexer.core.healing_kit import PROMPT, Shard
from tests.unit.indexer.core.published import SIZE

OTHER = PROMPT[: 3 * SIZE] + [n + 500 for n in range(3 * SIZE)]
PROMPTS = (PROMPT, OTHER)


@dataclass
class Asked:
    prompt: int
    name: str
    before: dict[int, tuple[int, bool]]
    removed: set[int] = field(default_factory=set)
    void: bool = False


@dataclass
class Naive:
    """The rules of healing, written down for one engine that is inexact: block -> (copies, doubtful)."""

    held: dict[int, tuple[int, bool]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def store(self, key: int) -> None:
        copies, doubtful = self.held.get(key, (0, False))
        self.held[key] = (1 if doubtful else copies + 1, False)

    def remove(self, key: int) -> None:
        copies, doubtful = self.held.pop(key, (0, False))
        if copies > 1:
            self.held[key] = (copies - 1, doubtful)
        for asked in self.asked:
            asked.removed.add(key)

    def lose(self) -> None:
        self.held = {key: (copies, True) for key, (copies, _) in self.held.items()}
        for asked in self.asked:
            asked.void = True

    def finish(self, asked: Asked, keys: Sequence[int], hit: int) -> None:
        self.asked.remove(asked)
        if asked.void:
            return
        for key in keys[:hit]:
            if key not in asked.removed and (key not in self.held or self.held[key][1]):
                self.held[key] = (1, False)
        predicted = sum(1 for _ in itertools.takewhile(asked.before.__contains__, keys))
        if hit >= predicted or keys[hit] in asked.removed or keys[hit] not in self.held:
            return
        copies, was_doubtful = asked.before[keys[hit]]
        if was_doubtful == self.held[keys[hit]][1]:
            for _ in range(copies):
                self.remove(keys[hit])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 1), st.integers(0, 5), st.integers(1, 3)),
        st.tuples(st.just("remove"), st.integers(0, 1), st.integers(0, 5)),
        st.tuples(st.just("route"), st.integers(0, 1)),
        st.tuples(st.just("finish"), st.integers(0, 9), st.integers(0, 6)),
        st.just(("lose",)),
    ),
    max_size=25,
).filter(lambda steps: steps.count(("lose",)) <= 8)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_healing_is_what_the_naive_model_says(steps: list[Any]) -> None:
    shard, naive = Shard(joined=5), Naive()
    shard.store(1, tokens=[9] * SIZE)  # its groups are known from then on
    for step in steps:
        match step:
            case ("store", prompt, since, blocks):
                end = min(6, since + blocks)
                shard.store(end, since=since, tokens=PROMPTS[prompt])
                for key in shard.keys(PROMPTS[prompt])[since:end]:
                    naive.store(key)
            case ("remove", prompt, block):
                shard.remove(block, tokens=PROMPTS[prompt])
                naive.remove(shard.keys(PROMPTS[prompt])[block])
            case ("lose",):
                shard.lose()
                naive.lose()
            case ("route", prompt):
                naive.asked.append(Asked(prompt, shard.route(PROMPTS[prompt]), dict(naive.held)))
            case ("finish", which, hit) if naive.asked:
                asked = naive.asked[which % len(naive.asked)]
                before = dict(naive.held)
                naive.finish(asked, shard.keys(PROMPTS[asked.prompt]), hit)
                assert shard.finish(asked.name, hit) is (naive.held != before)
        keys = {key for prompt in PROMPTS for key in shard.keys(prompt)}
        holders = {key: shard.residency.holders(key) for key in keys}
        assert {key: (h.copies, h.doubtful) for key, found in holders.items() for h in found} == naive.held
