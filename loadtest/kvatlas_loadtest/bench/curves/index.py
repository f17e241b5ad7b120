"""What the index itself takes, in process, over the memory store: lookups, events, memory.

Times are of this thread's CPU, so that what else the machine does counts less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from kvatlas_common.lasting import keep_what_is_built
from kvatlas_loadtest.bench.curves.curve import Claim, Column, Curve
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Prompt
from kvatlas_loadtest.bench.in_process import InProcess
from kvatlas_loadtest.bench.lookups import BLOCK, Held, check
from kvatlas_loadtest.bench.memory import growth
from kvatlas_loadtest.bench.rows import Options

ENGINES = 32
BLOCKS = 512
HOLDING = 8
LOOKED_UP = 49_152  # blocks, in the lookups of one point; within bounds
PROMPTS_MIN, PROMPTS_MAX, WARM_UP = 8, 24, 2
MESSAGES = 2_048


async def lookup_by_blocks(options: Options) -> Curve:
    curve = Curve(
        "lookup_blocks",
        f"Lookup against blocks, {ENGINES} engines that all hold some",
        "blocks",
        (Column("lookup", "ms", Claim("with the blocks that are looked up", grows=1.0), digits=3),),
    )
    for blocks in options.points(64, 128, 256, 512, 1024, 2048, 4096, 8192):
        curve.points[blocks] = (_lookup_ms(blocks, ENGINES, None),)
    return curve


async def lookup_by_engines(options: Options) -> Curve:
    flat = Claim("with engines that match, not with engines that exist", since=HOLDING)
    curve = Curve(
        "lookup_engines",
        f"Lookup of {BLOCKS} blocks against engines",
        "engines",
        (
            Column("all hold some", "ms", Claim("no faster than the engines that match", grows=1.0), digits=3),
            Column(f"{HOLDING} hold some, the others nothing", "ms", flat, digits=3),
        ),
    )
    for engines in options.points(1, 8, 32, 128, 512):
        few = _lookup_ms(BLOCKS, engines, HOLDING) if engines > HOLDING else None
        every = _lookup_ms(BLOCKS, engines, None)
        curve.points[engines] = (every, every if engines == HOLDING else few)
    return curve


def _lookup_ms(blocks: int, engines: int, holding: int | None) -> float:
    """p50; each prompt is looked up once, and what is found is what there is."""
    prompts = min(max(LOOKED_UP // blocks, PROMPTS_MIN), PROMPTS_MAX)
    held, to = Held.drawn(prompts + WARM_UP, blocks, engines, holding), InProcess(engines, BLOCK)
    for engine, payload in held.messages():
        to.hear(engine, payload)
    keep_what_is_built()
    took = []
    for prompt, depths in zip(held.prompts, held.depths, strict=True):
        began = time.thread_time()
        answer = to.match(prompt.keys)
        took.append(time.thread_time() - began)
        check({str(m.engine): m.blocks for m in answer.matches}, list(map(str, to.engines)), depths)
    return median(took[WARM_UP:]) * 1e3


async def ingest_by_engines(options: Options) -> Curve:
    flat = Claim("not with the fleet")
    curve = Curve(
        "ingest_engines",
        f"Events against fleet size: CPU per block, from a message of {EVENT_BLOCKS} blocks to its being visible",
        "engines",
        (Column("blocks of their own", "us", flat), Column("the same blocks on every engine", "us", flat)),
    )
    messages = options.count(MESSAGES, 64)
    for engines in options.points(1, 8, 32, 128, 512):
        per = max(messages // engines, 1)
        own, same = [_prompts(count) for count in (per * engines, per)]
        curve.points[engines] = (
            _ingest_us(engines, per, lambda engine, turn, p=own, n=engines: p[turn * n + engine]),  # type: ignore[misc]
            _ingest_us(engines, per, lambda engine, turn, p=same: p[turn]),  # type: ignore[misc]
        )
    return curve


def _prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(rng, EVENT_BLOCKS, BLOCK) for _ in range(count)]


def _ingest_us(engines: int, turns: int, prompt: Callable[[int, int], Prompt]) -> float:
    to = InProcess(engines, BLOCK)
    said = [(e, prompt(e, turn).message(0, EVENT_BLOCKS)) for turn in range(turns) for e in range(engines)]
    keep_what_is_built()
    began = time.thread_time()
    for engine, payload in said:
        to.hear(engine, payload)
    return (time.thread_time() - began) / (len(said) * EVENT_BLOCKS) * 1e6


async def memory_by_entries(options: Options) -> Curve:
    claim = Claim("memory grows with what is held, no faster", grows_max=1.5)
    curve = Curve(
        "memory_entries",
        "Memory against entries (block, engine), one holder per block",
        "entries",
        (Column("resident memory", "MB", digits=0), Column("per entry", "bytes", claim, digits=0)),
        note="What the process has grown by, everything that goes with them included.",
    )
    points = options.points(100_000, 1_000_000, 3_000_000, 10_000_000)
    for entries, grown in growth(points if not options.quick else (2_000, 20_000)):
        curve.points[entries] = (grown / 1e6, grown / entries)
    return curve
