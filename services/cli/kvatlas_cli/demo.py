"""`kvatlas demo`: three simulated engines, the acceptance check, and the same load under random and precise routing.

The check is the one users of precise routing run: a streamed chat request, then the same conversation with the answer
and a further question; both must be handled by the same engine, the second one mostly from its cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvatlas_cli import local
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.logs import setup_logs
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.client import Answer, ask
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.loads.arrivals import Arrival, Segment
from kvatlas_loadtest.loads.figures import Figures, figures
from kvatlas_loadtest.loads.outcomes import Outcome, Run
from kvatlas_loadtest.loads.real_time import Player, Target
from kvatlas_loadtest.loads.rendering import Rendering
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import TimeModel
from kvatlas_router.settings import RouterSettings

ENGINES = 3
READY_S = 20.0
POLICIES = ("random", "precise")
CHAT = "/v1/chat/completions"
SYSTEM = (
    "You are the narrator of a text adventure. Describe each place the player enters, the things that can be seen "
    "there and the ways that lead on. Keep a list of what the player carries. Never decide for the player. "
) * 6
OPENING = (
    "I light the lamp and go down the stairs under the old library, counting the steps. What do I see at the bottom, "
    "and which of the three doors is open?"
)
CUSTOMERS, QUESTIONS_EACH, AT_A_TIME, SEED = 12, 12, 6, 1
CONTEXT, QUESTION, ANSWER = 1500, 60, 16  # tokens
LIMITS = EngineLimits(num_blocks=700, block_size=16)  # room for about six of the twelve contexts: no engine holds all
TIME = TimeModel(speed=4.0)


@dataclass(frozen=True, slots=True)
class Check:
    """The acceptance check: which engine took each turn, and how much of the second came from its cache."""

    engines: tuple[str, str]
    prompt_tokens: int
    cached_tokens: int
    reason: str

    @property
    def passed(self) -> bool:
        return self.engines[0] == self.engines[1] != "" and self.cached_tokens > 0


@dataclass(frozen=True, slots=True)
class Demo:
    check: Check
    figures: Mapping[str, Figures]

    @property
    def precise_won(self) -> bool:
        blind, precise = self.figures["random"], self.figures["precise"]
        if blind.ttft is None or precise.ttft is None or precise.errors or precise.shed:
            return False
        faster = precise.ttft.p50 < blind.ttft.p50 and precise.ttft.p90 < blind.ttft.p90
        return faster and precise.cached_share > blind.cached_share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 only if the check passed and precise routing won."""
    setup_logs(sys.stderr, "error", "text")
    console = Console(stderr=arguments.json, highlight=False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        demo = runner.run(_demo(console))
    if arguments.json:
        reports = {policy: _as_json(those) for policy, those in demo.figures.items()}
        print(json.dumps({"check": asdict(demo.check), "reports": reports, "precise_won": demo.precise_won}))
    _print(console, demo)
    return 0 if demo.check.passed and demo.precise_won else 1


async def _demo(console: Console) -> Demo:
    found: dict[str, Figures] = {}
    configs = [EngineConfig(limits=LIMITS, time_model=TIME, seed=number) for number in range(ENGINES)]
    console.print(f"{ENGINES} simulated engines, each {TIME.speed:g} times as fast as a 32B model on one large GPU")
    check: Check | None = None
    for policy in POLICIES:
        async with local.simulated(configs) as engines, _serving(policy, engines) as stack:
            await _ready(stack, policy)
            if policy == "precise":
                check = await _check(stack)
                _print_check(console, check)
            found[policy] = await _load(console, stack, policy)
    assert check is not None
    return Demo(check, found)


def _serving(policy: str, engines: tuple[SimulatedEngine, ...]) -> Any:
    indexer = IndexerSettings.model_validate(
        {"zmq_listen": (), "grpc_listen": "127.0.0.1:0", "rest_listen": "127.0.0.1:0"}
    )
    router = RouterSettings.model_validate(
        {
            "host": "127.0.0.1",
            "port": 0,
            "admin_port": 0,
            "policy": policy,
            "seed": 1,
            "lookup_deadline_ms": 200,
            "drain_delay_s": 0,
        }
    )
    return local.serving(indexer, router, engines, os.environ)


async def _ready(stack: local.LocalStack, policy: str) -> None:
    """Until the router knows every engine, has its tokenizer, and the index is synchronised."""

    async def known() -> bool:
        views = stack.router.fleet.fleet.engines.values()
        healthy = sum(view.health is Health.READY and "tiny" in view.models for view in views)
        return healthy == ENGINES and all(view.sync is Sync.EXACT for view in views)

    await local.until(known, "the engines became ready", READY_S)
    async with aiohttp.ClientSession() as session:

        async def tokenises() -> bool:
            route = await _route(session, stack, _conversation([("user", "?")]))
            return bool(route["tokenised"] == "local")

        if policy == "precise":
            await local.until(tokenises, "the router had the tokenizer", READY_S)


async def _route(session: aiohttp.ClientSession, stack: local.LocalStack, body: dict[str, Any]) -> dict[str, Any]:
    """What the router would do with a request, and why."""
    async with session.post(f"{stack.admin_url}/debug/route", json=body) as answer:
        route: dict[str, Any] = await answer.json()
        return route


async def _check(stack: local.LocalStack) -> Check:
    first = _conversation([("user", "Are you ready?")])
    async with aiohttp.ClientSession() as session:
        asked = await ask(session, stack.url, first, CHAT)
        await _indexed(stack, asked)
        second = _conversation([("user", "Are you ready?"), ("assistant", asked.text), ("user", OPENING)])
        followed = await ask(session, stack.url, second, CHAT)
        route = await _route(session, stack, second)
    return Check((asked.engine, followed.engine), followed.prompt_tokens, followed.cached_tokens, route["reason"])


def _conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}]
    messages += [{"role": role, "content": content} for role, content in turns]
    return {"model": "tiny", "stream": True, "max_tokens": 24, "messages": messages}


async def _indexed(stack: local.LocalStack, answered: Answer) -> None:
    """Until the index shows what the first answer left in its engine's cache."""
    blocks = answered.prompt_tokens // LIMITS.block_size

    async def stored() -> bool:
        held = [sum(engine.blocks().values()) for engine in stack.indexer.index.engines()]
        return max(held, default=0) >= blocks

    await local.until(stored, "the index showed the first answer's blocks", READY_S)


def _arrivals() -> list[Arrival]:
    """Every customer's context with questions nobody asked before, shuffled; each is asked when the one `AT_A_TIME`
    before it has been answered."""
    customers = [c for c in range(CUSTOMERS) for _ in range(QUESTIONS_EACH)]
    random.Random(SEED).shuffle(customers)
    return [
        Arrival(
            at_s=0.0,
            prompt=(Segment(customer, CONTEXT), Segment(CUSTOMERS + number, QUESTION)),
            output_tokens=ANSWER,
            after=number - AT_A_TIME if number >= AT_A_TIME else None,
        )
        for number, customer in enumerate(customers)
    ]


async def _load(console: Console, stack: local.LocalStack, policy: str) -> Figures:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    arrivals = _arrivals()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{policy:>8} routing", total=len(arrivals))

        def answered(outcome: Outcome) -> None:
            progress.advance(task)

        player = Player(Target(stack.url, Rendering("tiny")), arrivals, answered)
        await player.play()
    return figures(Run(policy, "demo", SEED, tuple(player.outcomes), samples=(), oracle_cached_tokens=0))


def _print_check(console: Console, check: Check) -> None:
    same = "the same engine" if check.engines[0] == check.engines[1] else "ANOTHER ENGINE"
    console.print(f"check: turn 1 went to {check.engines[0]}, turn 2 to {check.engines[1]}: {same},")
    console.print(
        f"       {check.cached_tokens} of its {check.prompt_tokens} prompt tokens from the cache ({check.reason})"
    )


def _as_json(those: Figures) -> dict[str, Any]:
    return {
        "requests": those.requests,
        "errors": those.errors,
        "shed": those.shed,
        "ttft_p50_s": those.ttft.p50 if those.ttft else None,
        "ttft_p90_s": those.ttft.p90 if those.ttft else None,
        "cached_share": those.cached_share,
        "per_engine": {name: engine.requests for name, engine in those.engines.items()},
        "output_tokens_per_s": those.output_tokens_per_s,
        "duration_s": those.duration_s,
    }


def _print(console: Console, demo: Demo) -> None:
    table = Table("routing", "TTFT P50", "TTFT P90", "cached", "output tokens/s", "requests per engine", "errors")
    for policy, those in demo.figures.items():
        table.add_row(
            policy,
            _milliseconds(those.ttft.p50 if those.ttft else None),
            _milliseconds(those.ttft.p90 if those.ttft else None),
            f"{those.cached_share:.0%}",
            f"{those.output_tokens_per_s:.0f}",
            " / ".join(str(engine.requests) for _, engine in sorted(those.engines.items())),
            str(those.failed + those.shed),
        )
    console.print(table)
    console.print("precise routing won" if demo.precise_won else "precise routing did NOT win")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
