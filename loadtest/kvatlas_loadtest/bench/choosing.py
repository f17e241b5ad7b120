"""What the router's decision costs once the index has answered: from the matches to the choice, and to the request on
the books, for a fleet of 100 engines of which a third hold something of the prompt and all have requests in flight.

As in a router, the engines' states are prepared while the index is asked; what that takes is a row of its own.
"""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np

from kvatlas_common.fleet import EngineView, Health, InFlight, Load, Sync
from kvatlas_common.lasting import keep_what_is_built
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId, Medium
from kvatlas_loadtest.bench.rows import Options, Row, at_most, only_told
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.books import Ticket
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.policies import PolicyName, policy

ENGINES = 100
HOLDERS = 33
BLOCKS = 512
PROFILE = "sha256_cbor/b16/tagged/seed=42"
REQUESTS_PER_S = 500.0
IN_FLIGHT = 1500


async def rows(options: Options) -> list[Row]:
    chance = random.Random(1)
    views, loads = _fleet(chance)
    chooser, precise = Chooser(chance.random), policy(PolicyName.PRECISE)
    flying: deque[Ticket] = deque()
    prepared: list[float] = []
    decided: list[float] = []
    entered: list[float] = []
    with _collected_as_in_a_router():
        for n in range(options.count(6000, 50)):
            now = n / REQUESTS_PER_S
            ask, answer = _request(chance, views)
            asked = time.perf_counter()
            chooser.prepare(views, loads, now)
            began = time.perf_counter()
            choice = chooser.choose(precise, ask, views, loads=loads, answer=answer, now=now)
            chosen = time.perf_counter()
            assert choice is not None
            flying.append(chooser.send(choice.terms[0], ask, now))
            prepared.append(began - asked)
            decided.append(chosen - began)
            entered.append(time.perf_counter() - chosen)
            _answer(flying, now)
    half = len(decided) // 2  # in the first half the books are still filling
    return [
        at_most("choose_100_engines_ms", median(decided[half:]) * 1000, "ms, p50, matches to choice", 0.3),
        only_told("choose_100_engines_prepare_ms", median(prepared[half:]) * 1000, "ms, p50, while the index is asked"),
        only_told("choose_100_engines_send_ms", median(entered[half:]) * 1000, "ms, p50, choice to books"),
    ]


@contextmanager
def _collected_as_in_a_router() -> Iterator[None]:
    before = gc.get_threshold()
    keep_what_is_built()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _fleet(chance: random.Random) -> tuple[list[EngineView], dict[EngineId, Load]]:
    views = [
        EngineView(
            EngineId(f"10.0.0.{n}:8000"),
            f"http://10.0.0.{n}:8000",
            health=Health.READY,
            profile=PROFILE,
            block_size=16,
            sync=Sync.EXACT,
            kv_tokens=300_000,
        )
        for n in range(ENGINES)
    ]
    loads = {
        view.id: Load(
            running=chance.randrange(40),
            kv_usage=chance.random() * 0.8,
            scraped_at=1.0,
            others=InFlight(chance.randrange(3), chance.randrange(9000), chance.randrange(20)),
        )
        for view in views
    }
    return views, loads


def _request(chance: random.Random, views: list[EngineView]) -> tuple[Ask, MatchAnswer]:
    keys = np.array([chance.getrandbits(64) for _ in range(BLOCKS)], dtype=np.uint64)
    depths = [(view, chance.randrange(1, BLOCKS)) for view in chance.sample(views, HOLDERS)]
    matches = tuple(EngineMatch(v.id, n, {Medium.GPU: n}, exact=True, expected=n) for v, n in depths)
    return Ask("m", BLOCKS * 16 + 8, {PROFILE: keys}), MatchAnswer(matches)


def _answer(flying: deque[Ticket], now: float) -> None:
    """Some requests get their first token, the oldest end."""
    for place in (-3, -9):
        if len(flying) >= -place:
            flying[place].started(now)
    while len(flying) > IN_FLIGHT:
        ticket = flying.popleft()
        ticket.ended(now, 0, 200)
        ticket.close()
