"""The services as the manifests start them, their addresses alone being the test's: probes get the answers they wait
for, and engines that connect, connect with a replay port, or are dialled, are routed to by what they hold."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas_cli.local import until
from kvatlas_common.engines.specs import EngineFile, EngineSource
from kvatlas_indexer.app import Indexer
from kvatlas_loadtest.engine import ANY_PORT, EngineConfig
from kvatlas_router.app import Router
from tests.integration.engine_kit import simulated_engine
from tests.unit.deploy.manifests import rendered
from tests.unit.deploy.services import indexer_settings, router_settings

DEADLINE_S = 20.0
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
CHAT = {
    "model": "tiny",
    "max_tokens": 4,
    "messages": [{"role": "user", "content": "You are in a cave, and it is dark. There is a door. " * 20}],
}


@asynccontextmanager
async def indexer_of_base(folder: Path, *engines: EngineSource) -> AsyncIterator[Indexer]:
    _, settings = indexer_settings(rendered("base"), folder / "indexer")
    here = {
        "zmq_listen": (ANY_PORT,),
        "grpc_listen": "127.0.0.1:0",
        "rest_listen": "127.0.0.1:0",
        "engines": engines,
        "engine_refresh_s": 0.05,
    }
    indexer = Indexer(settings.model_copy(update=here), environ={})
    await indexer.start()
    try:
        yield indexer
    finally:
        await indexer.stop()


@asynccontextmanager
async def router_of_base(folder: Path, indexer: Indexer) -> AsyncIterator[str]:
    """Its URL."""
    _, settings = router_settings(rendered("base"), folder / "router")
    here = {
        "host": "127.0.0.1",
        "port": 0,
        "admin_port": 0,
        "indexers": (indexer.grpc_address,),
        "engines": (),
        "state_dir": folder / "state",
    }
    router = Router(settings.model_copy(update=here), environ={})
    await router.start()
    try:
        yield f"http://127.0.0.1:{router.public_port}"
    finally:
        await router.stop()


async def test_the_indexers_probes_are_answered(tmp_path: Path) -> None:
    probes = rendered("base").workload("kvatlas-indexer").probes
    async with (
        indexer_of_base(tmp_path) as indexer,
        grpc.aio.insecure_channel(indexer.grpc_address) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in PROBES:
            asked = health_pb2.HealthCheckRequest(service=probes[name]["grpc"].get("service", ""))
            answer: health_pb2.HealthCheckResponse = await health.Check(asked, timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


async def test_the_routers_probes_tell_alive_from_ready(tmp_path: Path) -> None:
    probes = rendered("base").workload("kvatlas-router").probes
    async with (
        indexer_of_base(tmp_path) as indexer,
        router_of_base(tmp_path, indexer) as url,
        aiohttp.ClientSession(url) as http,
    ):
        statuses = {}
        for name in PROBES:
            async with http.get(probes[name]["httpGet"]["path"]) as answer:
                statuses[name] = answer.status
    assert statuses == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}  # it knows no engine


@pytest.mark.parametrize("way", ["connect", "replay", "dial"])
async def test_engines_are_found_and_routed_to_by_what_they_hold(way: str, tmp_path: Path) -> None:
    listed = tmp_path / "engines.yaml"
    listed.write_text("[]", "utf-8")
    async with (
        indexer_of_base(tmp_path, EngineFile(listed)) as indexer,
        router_of_base(tmp_path, indexer) as url,
        simulated_engine(
            EngineConfig(
                events_endpoint=ANY_PORT if way == "dial" else indexer.zmq_endpoints[0],
                replay_endpoint=None if way == "connect" else ANY_PORT,
            )
        ) as engine,
        aiohttp.ClientSession(url) as http,
    ):
        ports = {"events": engine.events_endpoint, "replay": engine.replay_endpoint}
        bound = {
            name: ports[name] for name in {"connect": (), "replay": ("replay",), "dial": ("events", "replay")}[way]
        }
        listed.write_text(json.dumps([{"address": engine.address, **bound}]), "utf-8")

        async def ready() -> bool:
            async with http.get("/readyz") as answer:
                return answer.status == 200

        async def routed_precisely() -> bool:
            async with http.post("/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
                said = answer.headers
                return said["x-kvatlas-reason"] == "precise" and int(said["x-kvatlas-cached-tokens"]) > 0

        await until(ready, "an engine is up", DEADLINE_S)
        await until(routed_precisely, "the index knows what the engine holds", DEADLINE_S)
