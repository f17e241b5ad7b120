"""The acceptance on real engines: 200 mixed requests through a router in front of two vLLM, three ways configured.

`make test-vllm`, with KVATLAS_VLLM naming a virtual environment that holds vLLM (its CPU build will do). It takes four
to six minutes on two cores.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.live.client import send
from tests.live.comparison import Exchange, Report, compare, table
from tests.live.deployment import MODEL, Configuration, Deployment, deploy, make_model
from tests.live.workload import Workload

REQUESTS = 200
EXACT_SHARE_MIN = 0.99
IMPRECISE_MAX = 2  # until an engine's first event tells its hash profile, nothing can be predicted of it
PRECISE = "precise"
OVERTAKING_MAX = 2  # follow-ups sent before their home had published what it holds
READING_S = 0.05  # clients read an answer before they go on; without it, some requests overtake their engine's events
VLLM = os.environ.get("KVATLAS_VLLM", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM, reason="KVATLAS_VLLM is not set: name a virtual environment with vLLM in it"),
]

CONFIGURATIONS = (
    Configuration(
        "reference",
        "full",
        ("--block-size", "64", "--prefix-caching-hash-algo", "sha256_cbor"),
        {"PYTHONHASHSEED": "42"},
        ("--block-size", "64", "--prefix-caching-hash-algo", "sha256_cbor", "--hash-seed", "42"),
    ),
    Configuration("defaults", "full", ("--block-size", "32", "--num-gpu-blocks-override", "250")),
    Configuration(
        "hybrid",
        "hybrid",
        ("--block-size", "32", "--prefix-caching-hash-algo", "sha256_cbor"),
        {"PYTHONHASHSEED": "42"},
    ),
)


@pytest.fixture(scope="module")
def vllm() -> Path:
    venv = Path(VLLM)
    if not (venv / "bin" / "vllm").exists():
        pytest.fail(f"KVATLAS_VLLM={VLLM}: there is no {venv}/bin/vllm")
    return venv


@pytest.fixture(scope="module")
def models(vllm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(vllm, folder / kind, kind) for kind in ("full", "hybrid")}


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, tuple[Report, dict[str, float]]]]:
    """What the configurations came to; printed as one table when all are done."""
    found: dict[str, tuple[Report, dict[str, float]]] = {}
    yield found
    if found:
        print("\n" + table({n: r for n, (r, _) in found.items()}, {n: m for n, (_, m) in found.items()}))


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda c: c.name)
def configuration(request: pytest.FixtureRequest) -> Configuration:
    chosen: Configuration = request.param
    return chosen


@pytest.fixture(scope="module")
def deployment(
    vllm: Path, models: dict[str, Path], configuration: Configuration, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    logs = tmp_path_factory.mktemp(f"logs-{configuration.name}")
    with deploy(vllm, models[configuration.model], configuration, logs) as running:
        yield running


async def test_what_is_predicted_is_what_the_engines_report(
    configuration: Configuration, deployment: Deployment, figures: dict[str, tuple[Report, dict[str, float]]]
) -> None:
    report = compare(await _run(deployment))
    more = _more(deployment)
    figures[configuration.name] = (report, more)
    _print(configuration.name, report)

    assert not report.failed, [f"#{e.number} {e.status} {e.error}" for e in report.failed]
    assert report.requests == REQUESTS
    assert report.incomparable <= IMPRECISE_MAX, report.reasons
    assert report.exact_share >= EXACT_SHARE_MIN, [str(d) for d in report.differences]
    assert not report.unexplained, [str(d) for d in report.unexplained]
    assert set(report.per_engine) == set(deployment.engines), "an engine was never used"
    assert report.actual_tokens > report.prompt_tokens // 4, "too little was cached for the comparison to mean much"
    assert more["tokenised remote"] == 0
    assert more["tokenised local"] > REQUESTS // 2
    assert more["checks of tokens that differed"] == 0
    assert (more["blocks evicted"] > 0) == ("--num-gpu-blocks-override" in configuration.flags)
    assert report.homes > REQUESTS // 5
    astray = [s for s in report.strayed if s.exchange.reason == PRECISE]
    assert not [str(s) for s in astray if not s.overtook]
    assert len(astray) <= OVERTAKING_MAX, [str(s) for s in astray]


def _more(deployment: Deployment) -> dict[str, float]:
    return {
        "tokenised local": deployment.router_metric("tokenised_total", where="local"),
        "tokenised remote": deployment.router_metric("tokenised_total", where="remote"),
        "checks of tokens that differed": deployment.router_metric("parity_mismatches_total"),
        "lookups": deployment.router_metric("decision_seconds_count", stage="match"),
        "lookups within the default 20 ms": deployment.router_metric(
            "decision_seconds_bucket", stage="match", le="0.02"
        ),
        "blocks stored": deployment.indexer_metric("block_changes_total", change="stored"),
        "blocks evicted": deployment.indexer_metric("block_changes_total", change="removed"),
    }


async def _run(deployment: Deployment) -> list[Exchange]:
    vocabulary = (inspect.getsource(textwrap) + inspect.getsource(json.decoder)).split()
    workload = Workload(random.Random(7), vocabulary, requests=REQUESTS, model=MODEL)
    exchanges: list[Exchange] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        while wave := workload.wave():
            for ask, (exchange, text) in zip(
                wave, await asyncio.gather(*(send(session, deployment.router, ask) for ask in wave)), strict=True
            ):
                exchanges.append(exchange)
                workload.answered(ask, text)
            await asyncio.sleep(READING_S)
    return exchanges


def _print(name: str, report: Report) -> None:
    print(f"\n{name}: {report.strict_equal + report.loose_equal} of {report.strict + report.loose} predictions exact")
    print(f"  reasons: {dict(report.reasons)}")
    for line in (*report.differences, *report.strayed):
        print(f"  {line}")
