"""`/debug/*` of a simulated engine: the truth about its cache for checkers, and its faults; off unless asked for."""

from __future__ import annotations

import aiohttp

from kvatlas_loadtest.engine import EngineConfig
from kvatlas_loadtest.publisher import Faults, ReplayFault
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.engine_kit import simulated_engine

BODY = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "value " * 80}]}


async def test_the_block_table_is_what_the_engine_holds_and_how_far_it_has_published() -> None:
    config = EngineConfig(time_model=NO_TIME, debug=True)
    async with simulated_engine(config) as engine, aiohttp.ClientSession(engine.url) as session:
        async with session.post("/v1/chat/completions", json=BODY) as answered:
            assert answered.status == 200
        async with session.get("/debug/block_table") as response:
            (table,) = (await response.json())["ranks"]
        assert {int(key): copies for key, copies in table["blocks"].items()} == engine.block_table() != {}
        assert sorted(table["arrivals"].values()) == [n + 1 for n in range(len(table["blocks"]))]
        assert table["rank"] == 0
        assert table["next_seq"] == engine.publisher().next_seq > 0


async def test_faults_are_set_as_a_whole_and_checked() -> None:
    config = EngineConfig(time_model=NO_TIME, debug=True)
    async with simulated_engine(config) as engine, aiohttp.ClientSession(engine.url) as session:
        for body, status in (
            ({"drop": 3, "replay": "silent"}, 200),
            ({"rank": 1, "drop": 3}, 400),
            ({"drop": -1}, 400),
            ({"dorp": 1}, 400),
        ):
            async with session.post("/debug/faults", json=body) as response:
                assert response.status == status, body
        assert engine.publisher().faults == Faults(drop=3, replay=ReplayFault.SILENT)
        async with session.post("/debug/faults", json={}) as response:
            assert response.status == 200
        assert engine.publisher().faults == Faults()


async def test_without_the_option_there_is_nothing_to_ask() -> None:
    config = EngineConfig(time_model=NO_TIME, events_endpoint=None)
    async with simulated_engine(config) as engine, aiohttp.ClientSession(engine.url) as session:
        for method, path in (("GET", "/debug/block_table"), ("POST", "/debug/faults")):
            async with session.request(method, path) as response:
                assert response.status == 404
