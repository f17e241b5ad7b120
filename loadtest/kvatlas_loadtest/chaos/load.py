"""A steady load through all routers, and its books.

Clients come as they would through a gateway: requests go to the routers that say they are ready, in turn; one whose
connection breaks before any of the answer has come is sent to the next router (and counted as retried). What a router
answers is final. Every request carries one of many shared contexts and a question of its own, and there are more
contexts than one engine has room for: sent where its context is not, a request shows it in its cached tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvatlas_loadtest.chaos.books import Exchange
from kvatlas_loadtest.texts import WORDS

CHAT = "/v1/chat/completions"
READY_EVERY_S = 0.2
ANSWER_WITHIN_S = 30.0
CONNECT_WITHIN_S = 2.0
UNDER_WAY_MAX = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in words (about tokens); `rate_per_s` requests are sent whether or not others have been answered."""

    contexts: int = 30
    context_words: int = 400
    question_words: int = 24
    answer_tokens: int = 24
    rate_per_s: float = 16.0


class Load:
    """`start`, then `pause` and `resume` at will, then `stop`. `exchanges` keeps the books of all requests.

    `these`: what is asked, without end; if not given, `bodies` of the shape and the seed.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        routers: Callable[[], Sequence[str]],
        shape: Shape,
        seed: int,
        these: Iterator[dict[str, Any]] | None = None,
    ) -> None:
        self.exchanges: list[Exchange] = []
        self.shape = shape
        self._session = session
        self._routers = routers
        self._bodies = these or bodies(shape, seed)
        self._chance = random.Random(seed + 1)
        self._ready: dict[str, bool] = {}
        self._turn = itertools.count()
        self._going = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._going.set()
        self._tasks = [asyncio.create_task(self._watch_routers()), asyncio.create_task(self._send())]

    async def pause(self) -> None:
        """No new requests; returns when those under way are answered."""
        self._going.clear()
        if self._under_way:
            await asyncio.wait(self._under_way)

    def resume(self) -> None:
        self._going.set()

    async def stop(self) -> None:
        for task in (*self._tasks, *self._under_way):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._under_way, return_exceptions=True)

    def since(self, moment: float, until: float = float("inf")) -> list[Exchange]:
        """Those begun from `moment` (monotonic) on, and before `until`."""
        return [e for e in self.exchanges if moment <= e.begun < until]

    async def settled(self, exchanges: Sequence[Exchange]) -> None:
        """Until all of them have ended, as each does: with its answer, or `ANSWER_WITHIN_S` after each try."""
        while any(e.ended is None for e in exchanges):
            await asyncio.sleep(0.02)

    async def _send(self) -> None:
        due = time.monotonic()
        while True:
            await self._going.wait()
            due = max(due + self._chance.expovariate(self.shape.rate_per_s), time.monotonic() - 0.5)
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            if not self._going.is_set():
                continue
            while len(self._under_way) >= UNDER_WAY_MAX:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            exchange = Exchange(time.monotonic())
            self.exchanges.append(exchange)
            task = asyncio.create_task(self._ask(next(self._bodies), exchange))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask(self, body: dict[str, Any], exchange: Exchange) -> None:
        for router in self._in_turn():
            exchange.router = router
            if await self._try(router, body, exchange):
                break
            exchange.retried += 1
        exchange.ended = time.monotonic()

    async def _try(self, router: str, body: dict[str, Any], exchange: Exchange) -> bool:
        """False: nothing of an answer came, and another router may give one."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN_S, sock_connect=CONNECT_WITHIN_S)
        headed = False
        try:
            async with self._session.post(router + CHAT, json=body, timeout=timeout) as response:
                headed = True
                exchange.headed(response.status, response.headers)
                if response.status != 200:
                    exchange.error = f"status {response.status}: {(await response.text())[:200]}"
                    return True
                async for line in response.content:
                    exchange.line(line, time.monotonic())
        except TimeoutError:
            exchange.broken(f"no end within {ANSWER_WITHIN_S:g} s")
        except aiohttp.ClientError as failure:
            if not headed:
                self._ready[router] = False
                exchange.error = f"no router answered, the last one not because of {failure!r}"
                return False
            exchange.broken(repr(failure))
        return True

    def _in_turn(self) -> list[str]:
        """Ready ones first: readiness is seen late, so the others are tried too."""
        routers = list(self._routers())
        start = next(self._turn) % max(len(routers), 1)
        turned = routers[start:] + routers[:start]
        return sorted(turned, key=lambda r: not self._ready.get(r, True))

    async def _watch_routers(self) -> None:
        while True:
            await asyncio.gather(*map(self._look, self._routers()))
            await asyncio.sleep(READY_EVERY_S)

    async def _look(self, router: str) -> None:
        try:
            async with self._session.get(router + "/readyz", timeout=aiohttp.ClientTimeout(total=1)) as response:
                self._ready[router] = response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            self._ready[router] = False


def bodies(shape: Shape, seed: int) -> Iterator[dict[str, Any]]:
    """Without end. All follows from the seed."""
    chance = random.Random(seed)
    contexts = [" ".join(chance.choices(WORDS, k=shape.context_words)) for _ in range(shape.contexts)]
    for number in itertools.count():
        question = f"{number} {' '.join(chance.choices(WORDS, k=shape.question_words))}"
        yield {
            "model": "tiny",
            "max_tokens": shape.answer_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": chance.choice(contexts)},
                {"role": "user", "content": question},
            ],
        }


def warm_up_bodies(shape: Shape, seed: int) -> list[dict[str, Any]]:
    """One request of each context."""
    wanted: dict[str, dict[str, Any]] = {}
    for body in bodies(shape, seed):
        wanted.setdefault(json.dumps(body["messages"][0]), body)
        if len(wanted) == shape.contexts:
            break
    return list(wanted.values())
