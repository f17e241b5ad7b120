"""What the router adds to the time to the first byte, against the length of a prompt that was seen before or not.

As the rows `router_added_...`: a real router, an engine that costs nothing, asked in turns with and without the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from statistics import median

from kvatlas_loadtest.bench.accounting import running_s
from kvatlas_loadtest.bench.curves.curve import Claim, Column, Curve
from kvatlas_loadtest.bench.deployment import until
from kvatlas_loadtest.bench.prompts import Texts, model_folder
from kvatlas_loadtest.bench.routing import Client, Prompts, client, hold, predicted, routed
from kvatlas_loadtest.bench.rows import Options
from kvatlas_loadtest.prompting import Prompter

NEW_TOKENS = 256
WARM_UP = 3
WARM_REQUESTS = 60
READ_SHARE = 0.1
"""Of what a prompt costs that is new, at most this share may come with the length of one that is not: it is read."""


async def router_by_tokens(options: Options) -> Curve:
    seen = Claim("with new tokens, not with prompt length", grows=READ_SHARE)
    new = Claim("with new tokens", grows=1.0)
    curve = Curve(
        "router_tokens",
        "Time the router adds to the first byte against prompt length",
        "tokens",
        (
            Column(f"all seen but {NEW_TOKENS}", "ms", seen),
            Column("nothing seen", "ms", new),
            Column(f"all seen but {NEW_TOKENS}, router", "ms of CPU", seen),
            Column("nothing seen, router", "ms of CPU", new),
        ),
    )
    model, called = await asyncio.to_thread(model_folder, options.folder)
    curve.note = f"Through a real router, against the engine asked directly, p50; {called}."
    texts, prompter = Texts(model, seed=1), Prompter.load(model)
    async with AsyncExitStack() as stack:
        made, routing = await routed(stack, options.folder, model)
        engine = await stack.enter_async_context(client(f"http://{made[0].address}"))
        through = await stack.enter_async_context(client(routing.url))
        for tokens in options.points(1_000, 6_000, 24_000, 96_000):
            its = Prompts(texts.cut(tokens), texts, tokens, NEW_TOKENS)
            await hold(made[0], its, prompter)
            await until(lambda its=its: predicted(through, its), "the prompt to be found in the index")  # type: ignore[misc]
            count = options.count(30 if tokens < 50_000 else 15, 3)
            if not curve.points:  # a router's first requests find nothing warm
                await _added_ms(engine, through, routing.pid, its.body, options.count(WARM_REQUESTS, 1))
            seen_ms, seen_cpu = await _added_ms(engine, through, routing.pid, its.body, count)
            new_ms, new_cpu = await _added_ms(engine, through, routing.pid, lambda its=its: _fresh(its), count)  # type: ignore[misc]
            curve.points[tokens + NEW_TOKENS] = (seen_ms, new_ms, seen_cpu, new_cpu)
    return curve


def _fresh(prompts: Prompts) -> bytes:
    """The same but for its beginning: of what depends on that, nothing has been seen."""
    return prompts.body(system=prompts.texts.cut(8) + prompts.system)


async def _added_ms(
    engine: Client, through: Client, router: int, body: Callable[[], bytes], count: int
) -> tuple[float, float]:
    """Added by the router, p50, and its CPU per request."""
    bodies = [body() for _ in range(count + WARM_UP)]
    direct, by_router, spent = [], [], 0.0
    for number, asked in enumerate(bodies):
        if number == WARM_UP:
            spent = running_s(router)
        direct.append(await engine.ask(asked))
        by_router.append(await through.ask(asked))
    spent = running_s(router) - spent
    return (median(by_router[WARM_UP:]) - median(direct[WARM_UP:])) * 1e3, spent / count * 1e3
