"""The loads that policies are compared on. Each follows from a seed; `scale` shortens it and keeps its regime.

| name            | what it asks of a router                                                                        |
|-----------------|-------------------------------------------------------------------------------------------------|
| reference       | many prefixes, more than one engine holds, at rates beyond what misses leave room for           |
| agents          | conversations that grow, each turn on top of the last; many at once                             |
| hot-prefix      | half of all requests share one prefix: it must spread, and the long tail must not suffer        |
| all-unique      | nothing is shared: load is all there is                                                         |
| tenants         | the same prompts under different salts: what looks shared is not                                |
| bursts          | a new prefix, asked for by many at once, before any engine has computed it                      |
| trace:FILE      | a recorded load, in Mooncake's JSONL format                                                     |
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Part, Segment
from kvatlas_loadtest.loads.traces import read_trace

LADDER = (
    (3, 20),
    (10, 20),
    (15, 20),
    (20, 38),
    (22, 34),
    (25, 30),
    (30, 25),
    (35, 21),
    (40, 38),
    (43, 36),
    (46, 33),
    (49, 30),
    (52, 29),
    (55, 27),
    (57, 26),
    (60, 25),
)
"""(requests per second, seconds) of the published run, after a warm-up of 50 s at 15 requests per second."""
WARM_UP = (15, 50)
REFERENCE_ANSWER = 600
"""Tokens of an answer of the published run, which asked for 1,000.

Inferred, because the run does not report it: at 3, 10 and 15 requests/s, where nothing waits, requests x length over
the published tokens/s is how long a stage took; with 600 that is 20 s and a last answer at 16 to 19 ms a token, as such
engines take. *Random* at 60 requests/s says the same: 4,835 tokens/s and a first token after 106 s for nine in ten do
not go together with answers of 1,000.
"""


def reference(seed: int, scale: float = 1.0, *, fresh_questions: bool = False) -> list[Arrival]:
    """The published benchmark: 150 customers, 5 users each, 6,000 + 1,200 tokens in, 3 to 60 requests/s.

    Its profile is public (llm-d-kv-cache-manager, benchmarking, 'X-70R-6kSys', run with inference-perf): 750 prompts in
    all, a user's question being always the same, asked in shuffled rounds; Poisson arrivals; a warm-up, then 16 rates,
    each when everything before has been answered. `scale` keeps that many of the 16, evenly spread, the last always:
    shorter stages would not fill the queues. `fresh_questions`: no question is asked twice.
    """
    chance = random.Random(f"{seed} reference")
    prompts = [(Segment(c, 6000), Segment(1000 + c * 5 + u, 1200)) for c in range(150) for u in range(5)]
    kept = max(1, round(scale * len(LADDER)))
    places = [len(LADDER) - 1 - round(i * len(LADDER) / kept) for i in range(kept)]
    arrivals: list[Arrival] = []
    left: list[tuple[Segment, Segment]] = []
    for stage, (rate, duration_s) in enumerate([WARM_UP, *(LADDER[place] for place in sorted(places))]):
        at_s = 0.0
        for _ in range(rate * duration_s):
            at_s += chance.expovariate(rate)
            if not left:
                left = chance.sample(prompts, len(prompts))
            context, question = left.pop()
            if fresh_questions:
                question = Segment(100_000 + len(arrivals), 1200)
            session = f"user-{question.seed}" if not fresh_questions else f"customer-{context.seed}"
            arrivals.append(Arrival(round(at_s, 6), (context, question), REFERENCE_ANSWER, session, stage=stage))
    return arrivals


def agents(seed: int, scale: float = 1.0) -> list[Arrival]:
    """Conversations of 4 to 12 turns: tools and instructions of one of 12 agents, then question upon answer."""
    chance = random.Random(f"{seed} agents")
    conversations: list[list[Arrival]] = []
    number = count_from(10_000)
    for begins_s in _poisson(chance, rate=2.5, seconds=400 * scale):
        parts: list[Part] = [Segment(chance.randrange(12), 3000)]
        session, turns = f"conversation-{len(conversations)}", []
        for _ in range(chance.randint(4, 12)):
            parts.append(Segment(next(number), chance.randint(100, 900)))
            turns.append((tuple(parts), chance.randint(100, 500), chance.uniform(2, 12)))
            parts.append(Answer(-1))
        conversations.append(
            [
                Arrival(round(begins_s, 6), prompt, output, session, think_s=round(think, 3))
                for prompt, output, think in turns
            ]
        )
    return _woven(conversations)


def hot_prefix(seed: int, scale: float = 1.0) -> list[Arrival]:
    """Half of the requests share one 8,000-token prefix; the others have one of 400, by Zipf's law."""
    chance = random.Random(f"{seed} hot")
    weights = [1 / (rank + 1) for rank in range(400)]
    number = count_from(10_000)
    return [
        Arrival(
            round(at_s, 6),
            (
                Segment(0, 8000)
                if chance.random() < 0.5
                else Segment(1 + chance.choices(range(400), weights)[0], 4000),
                Segment(next(number), chance.randint(100, 600)),
            ),
            chance.randint(100, 400),
            f"user-{chance.randrange(2000)}",
        )
        for at_s in _poisson(chance, rate=32, seconds=180 * scale)
    ]


def all_unique(seed: int, scale: float = 1.0) -> list[Arrival]:
    """Prompts of 500 to 8,000 tokens that nobody has asked before."""
    chance = random.Random(f"{seed} unique")
    number = count_from(0)
    return [
        Arrival(
            round(at_s, 6),
            (Segment(next(number), int(500 * 16 ** chance.random())),),
            chance.randint(100, 600),
            f"user-{chance.randrange(2000)}",
        )
        for at_s in _poisson(chance, rate=20, seconds=180 * scale)
    ]


def tenants(seed: int, scale: float = 1.0) -> list[Arrival]:
    """40 tenants, each with a salt of its own, use the same 10 prompts of 5,000 tokens: nothing is shared across."""
    chance = random.Random(f"{seed} tenants")
    number = count_from(10_000)
    arrivals: list[Arrival] = []
    for at_s in _poisson(chance, rate=30, seconds=180 * scale):
        tenant = min(int(chance.expovariate(1 / 10)), 39)
        prompt = (Segment(chance.randrange(10), 5000), Segment(next(number), chance.randint(100, 500)))
        arrivals.append(
            Arrival(round(at_s, 6), prompt, chance.randint(100, 400), f"tenant-{tenant}", salt=f"salt-{tenant}")
        )
    return arrivals


def bursts(seed: int, scale: float = 1.0) -> list[Arrival]:
    """Every 5 s a prefix of 12,000 tokens nobody holds, asked for 24 times within a second; a steady load beside."""
    chance = random.Random(f"{seed} bursts")
    number = count_from(10_000)
    arrivals = [
        Arrival(
            round(at_s, 6),
            (Segment(chance.randrange(60), 2000), Segment(next(number), chance.randint(100, 600))),
            chance.randint(100, 300),
            f"user-{chance.randrange(2000)}",
        )
        for at_s in _poisson(chance, rate=12, seconds=180 * scale)
    ]
    for burst in range(math.ceil(180 * scale / 5)):
        for _ in range(24):
            at_s = burst * 5 + 2 + chance.random()
            prompt = (Segment(1000 + burst, 12_000), Segment(next(number), chance.randint(50, 200)))
            arrivals.append(Arrival(round(at_s, 6), prompt, chance.randint(50, 200), f"burst-{burst}"))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


WORKLOADS: Mapping[str, Callable[[int, float], list[Arrival]]] = {
    "reference": reference,
    "reference-fresh": lambda seed, scale: reference(seed, scale, fresh_questions=True),
    "agents": agents,
    "hot-prefix": hot_prefix,
    "all-unique": all_unique,
    "tenants": tenants,
    "bursts": bursts,
}


def workload(name: str, seed: int, scale: float = 1.0) -> list[Arrival]:
    """By name; a trace is the same for every seed. Raises `ValueError` that says which there are, and `OSError`."""
    if name.startswith("trace:"):
        return read_trace(Path(name.removeprefix("trace:")), scale)
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} is none of {', '.join(WORKLOADS)}, trace:FILE")
    return WORKLOADS[name](seed, scale)


def count_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _poisson(chance: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at_s = chance.expovariate(rate)
    while at_s < seconds:
        yield at_s
        at_s += chance.expovariate(rate)


def _woven(conversations: list[list[Arrival]]) -> list[Arrival]:
    """All turns in one list, by when their conversation began; `Answer(-1)` becomes the answer to the turn's own."""
    arrivals: list[Arrival] = []
    for turns in conversations:
        first = len(arrivals)
        for turn, arrival in enumerate(turns):
            answered = iter(range(first, first + turn))
            prompt = tuple(Answer(next(answered)) if isinstance(part, Answer) else part for part in arrival.prompt)
            after = first + turn - 1 if turn else None
            arrivals.append(
                Arrival(
                    arrival.at_s,
                    prompt,
                    arrival.output_tokens,
                    arrival.session,
                    after=after,
                    think_s=arrival.think_s if turn else 0.0,
                )
            )
    return arrivals
