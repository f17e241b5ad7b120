"""Garbage on every port, all at once and under load: nobody's request fails, and the index stays what it is."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from kvatlas_loadtest.engine import EngineConfig
from tests.integration.fault_kit import (
    BRISK,
    Index,
    client,
    failures,
    flags,
    load,
    metric,
    precise,
    ready_engines,
    simulated,
)
from tests.integration.garbage import (
    ENDLESS,
    babbler,
    goes_on,
    greetings,
    half_open,
    knock,
    strange_calls,
    strange_messages,
    strange_publisher,
    strange_requests,
)
from tests.integration.processes import indexer, router, until

ROUNDS = 3
REPEATS = 200
LINES_MAX = 60  # of one process, about thousands of refusals
OPTIONS = ("--message-bytes-max", str(1 << 18))


async def test_garbage_on_every_port_disturbs_nobody(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        (dialled,) = await enter(simulated(EngineConfig(time_model=BRISK)))
        babble = await enter(babbler(seed=1))
        none = ("--engine", f"{babble},events=tcp://{babble},replay=tcp://{babble}")
        indexing = await enter(indexer(tmp_path, "indexer", *OPTIONS, *flags(dialled), *none))
        (listened,) = await enter(simulated(EngineConfig(time_model=BRISK, events_endpoint=indexing.zmq)))
        options = ("--engine", listened.address, "--lookup-deadline-ms", "1000")
        routing = await enter(router(tmp_path, "router", *options, indexer=indexing.grpc))
        index, engines = Index(session, indexing.rest), (dialled, listened)
        await ready_engines(session, routing, 2, down=1)  # until then the babbler may be asked, too
        await precise(session, routing)
        addresses = [indexing.zmq.removeprefix("tcp://"), indexing.grpc, indexing.rest]
        addresses += [url.removeprefix("http://") for url in (routing.url, routing.admin)]

        async with load(session, routing.url, workers=3) as traffic, half_open(addresses, each=10):
            await until(lambda: {e.engine for e in traffic.exchanges} >= {e.address for e in engines}, "both used")
            for seed in range(ROUNDS):
                await asyncio.gather(
                    *(knock(a, g, reset=bool(seed % 2)) for a, g in itertools.product(addresses, greetings(seed)))
                )
            for address in addresses[2:]:
                for what, (begin, more) in ENDLESS.items():
                    assert not await goes_on(address, begin, more, 32 << 20), f"an endless {what} at {address}"
            calls = Counter(await strange_calls(indexing.grpc, seed=1))
            paths = ("/v1/chat/completions", "/v1/completions", "/nowhere")
            statuses = await strange_requests(session, routing.url, paths, seed=1)
            statuses += await strange_requests(session, routing.admin, ("/debug/route", "/metrics"), seed=1)
            statuses += await strange_requests(session, index.url, ("/v1/match", "/v1/engines"), seed=1)
            strange = strange_messages(1, listened.address, dialled.address)
            async with strange_publisher(indexing.zmq) as publisher:
                for message in [m for messages in strange.values() for m in messages] * REPEATS:
                    await publisher.send_multipart(message)
                for reason, messages in strange.items():
                    await until(_refused(index, reason, len(messages) * REPEATS), f"all of {reason} refused")
                await publisher.send_multipart([b"kv@127.0.0.1:1@tiny", bytes(8), bytes(1 << 20)])
            await traffic.more()

        assert failures(traffic.exchanges) == []
        for engine in engines:
            await index.agrees(engine.address, engine.block_table)
        assert {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"} <= calls.keys()
        assert await index.metric("grpc_unreadable_total") > 2
        assert await index.metric("observations_refused_total") == 50
        assert {s for s in statuses if s >= 500} <= {503}, "503: who cannot be asked might serve that model"
        assert await metric(session, routing.admin, "kvatlas_router_refused_total") > 30  # the parser turns away more
        for process in (indexing, routing):
            process.assert_sound()
            lines = Counter(str(line.get("event")) for line in process.lines() if line.get("level") != "info")
            assert lines.total() <= LINES_MAX, lines


def _refused(index: Index, reason: str, count: int) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return await index.metric("messages_refused_total", reason=reason) >= count

    return look
