"""Engines, indexer and router in one process: what `kvatlas up` and `kvatlas demo` run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.tracing import open_tracing
from kvatlas_indexer import app as indexer_app
from kvatlas_indexer.app import Indexer
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_router.app import Router, build
from kvatlas_router.settings import RouterSettings

CONDITION_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class LocalStack:
    engines: tuple[SimulatedEngine, ...]
    indexer: Indexer
    router: Router

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.public_port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.router.admin_port}"


@contextlib.asynccontextmanager
async def simulated(configs: Sequence[EngineConfig]) -> AsyncIterator[tuple[SimulatedEngine, ...]]:
    """Simulated engines that share one tokenizer."""
    async with contextlib.AsyncExitStack() as stack:
        engines: list[SimulatedEngine] = []
        for config in configs:
            first = engines[0] if engines else None
            engine = SimulatedEngine(config, first.prompter if first else None, first.vocabulary if first else None)
            engines.append(await stack.enter_async_context(engine))
        yield tuple(engines)


@contextlib.asynccontextmanager
async def serving(
    indexer_settings: IndexerSettings,
    router_settings: RouterSettings,
    engines: Sequence[SimulatedEngine],
    environ: Mapping[str, str],
) -> AsyncIterator[LocalStack]:
    """Indexer and router over the engines of the settings and the simulated ones. Raises `OSError` for a taken port."""
    added = tuple(
        EngineSpec(engine.address, engine.url, engine.events_endpoint, engine.replay_endpoint) for engine in engines
    )
    indexer = Indexer(
        indexer_settings.model_copy(update={"engines": indexer_settings.engines + added}),
        environ=environ,
        tracing=open_tracing(environ, indexer_app.SERVICE),
    )
    async with contextlib.AsyncExitStack() as stack:
        await indexer.start()
        stack.push_async_callback(indexer.stop)
        asked = router_settings.model_copy(
            update={"engines": router_settings.engines + added, "indexers": (reachable(indexer.grpc_address),)}
        )
        router = build(asked, environ)
        await router.start()
        stack.push_async_callback(router.stop, router_settings.drain_delay_s)
        yield LocalStack(tuple(engines), indexer, router)


def reachable(address: str) -> str:
    """Where to connect to what listens at `address`: loopback for what listens everywhere."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"0.0.0.0", "*", "", "[::]", "::"} else address


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
    """Waits for a condition. Raises `TimeoutError` that says what did not happen."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():
                await asyncio.sleep(CONDITION_POLL_S)
    except TimeoutError:
        raise TimeoutError(f"{what}: not within {timeout_s:g} s") from None
