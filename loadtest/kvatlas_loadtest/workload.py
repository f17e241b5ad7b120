"""A load whose prompts share long beginnings: customers with contexts of their own, asked about by several users.

The shape of the reference benchmark, at any size: every request carries its customer's whole context and a question
nobody asked before. Where a request goes decides whether the context is computed again. All follows from the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvatlas_loadtest.client import Answer, ask

CHAT = "/v1/chat/completions"
_WORDS = (
    "the return for not and file name with that line value from object are get this set type other data can path test "
    "list string option class has call new result module will read key time out method default function add use all "
    "context error used command code number form pass which must"
)
WORDS = _WORDS.split()
"""Plain words, one token each in common vocabularies: lengths in words are about lengths in tokens."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes in words. Each of `customers` x `users` asks `questions`; the order is shuffled."""

    customers: int = 8
    users: int = 3
    questions: int = 3
    context_words: int = 1500
    question_words: int = 60
    answer_tokens: int = 16
    model: str = "tiny"
    seed: int = 0

    def bodies(self) -> Iterator[dict[str, Any]]:
        """Chat completion bodies in the order they are sent."""
        chance = random.Random(self.seed)
        contexts = [_text(chance, self.context_words) for _ in range(self.customers)]
        asked = [c for c in range(self.customers) for _ in range(self.users * self.questions)]
        chance.shuffle(asked)
        for customer in asked:
            yield {
                "model": self.model,
                "max_tokens": self.answer_tokens,
                "messages": [
                    {"role": "system", "content": contexts[customer]},
                    {"role": "user", "content": _text(chance, self.question_words)},
                ],
            }

    def __len__(self) -> int:
        return self.customers * self.users * self.questions


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load came to. `ttft_*` of the answers that came whole, in seconds; NaN when none did."""

    requests: int
    errors: Mapping[str, int]
    ttft_p50_s: float
    ttft_p90_s: float
    cached_share: float  # cached of all prompt tokens, 0..1
    per_engine: Mapping[str, int]
    output_tokens_per_s: float
    duration_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer], duration_s: float) -> LoadReport:
        whole = [a for a in answers if not a.error]
        prompt_tokens = sum(a.prompt_tokens for a in whole)
        times = sorted(a.ttft_s for a in whole)
        return cls(
            requests=len(answers),
            errors=Counter(a.error for a in answers if a.error),
            ttft_p50_s=percentile(times, 0.5),
            ttft_p90_s=percentile(times, 0.9),
            cached_share=sum(a.cached_tokens for a in whole) / prompt_tokens if prompt_tokens else 0.0,
            per_engine=Counter(a.engine for a in whole if a.engine),
            output_tokens_per_s=sum(a.output_tokens for a in whole) / duration_s if duration_s > 0 else 0.0,
            duration_s=duration_s,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0..1) of the values do not exceed; NaN of none. `ordered` ascends."""
    if not ordered:
        return float("nan")
    return ordered[max(-int(-share * len(ordered) // 1) - 1, 0)]


async def run_load(
    url: str,
    workload: Workload,
    *,
    concurrency: int = 16,
    rate_per_s: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 120.0,
) -> LoadReport:
    """Sends the whole workload to `url` and waits for every answer.

    At most `concurrency` requests are under way. `rate_per_s`: they are sent at random times, so many a second on
    average; None: the next as soon as one is answered. `on_progress(done, all)` after every answer.
    """
    loop = asyncio.get_running_loop()
    chance = random.Random(workload.seed + 1)
    room = asyncio.Semaphore(concurrency)
    answers: list[Answer] = []

    async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        try:
            answers.append(await ask(session, url, body, CHAT))
        finally:
            room.release()
        if on_progress is not None:
            on_progress(len(answers), len(workload))

    begun = due = loop.time()
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        for body in workload.bodies():
            if rate_per_s is not None:
                due += chance.expovariate(rate_per_s)
                await asyncio.sleep(max(due - loop.time(), 0.0))
            await room.acquire()
            group.create_task(one(session, body))
    return LoadReport.of(answers, loop.time() - begun)


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))
