"""Builds the router from its settings, starts it, and stops it without dropping requests.

Nothing here decides anything: objects are made once, in order, and handed to each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack

from kvatlas_common.lasting import keep_what_is_built
from kvatlas_common.logs import LimitedLog
from kvatlas_common.tracing import Tracing, open_tracing, trace_logs
from kvatlas_router.adapters.admin import build_admin
from kvatlas_router.adapters.decide import Decider
from kvatlas_router.adapters.findings import Watch
from kvatlas_router.adapters.fleet import FleetKeeper
from kvatlas_router.adapters.forward import Forwarder, Patience
from kvatlas_router.adapters.gate import Gate
from kvatlas_router.adapters.http import HttpRules, PublicApi
from kvatlas_router.adapters.index_client import IndexClient, Interceptors
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.adapters.models import Tokenizers
from kvatlas_router.adapters.results import Results
from kvatlas_router.adapters.server import HttpServer
from kvatlas_router.adapters.traced import TracedApi, TracedForwarder, TracedGate, TracedMatch, traced_decider
from kvatlas_router.core.admission import Admission, AdmissionRules
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.diagnosis import Seen
from kvatlas_router.core.fail_opens import FailOpens
from kvatlas_router.core.homes import ResponseHomes
from kvatlas_router.core.outliers import OutlierRules, Outliers
from kvatlas_router.core.pressure import Pressure, PressureRules
from kvatlas_router.core.slow_start import SlowStart
from kvatlas_router.settings import RouterSettings

log = logging.getLogger(__name__)

DEFECTS_LOG_INTERVAL_S = 10.0
SERVICE = "kvatlas-router"


class Router:
    """One router. `start` returns when it listens; `public_port` and `admin_port` are then the bound ones."""

    def __init__(self, settings: RouterSettings, environ: Mapping[str, str], tracing: Tracing | None = None) -> None:
        self._settings = settings
        self._tracing = tracing
        self._stack = AsyncExitStack()
        name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"  # a new life is another router
        rng = random.Random(settings.seed)
        metrics = self.metrics = Metrics()
        outliers, slow_start = Outliers(_outlier_rules(settings)), SlowStart(settings.slow_start_s)
        chooser = self.chooser = Chooser(rng.random, outliers=outliers, slow_start=slow_start)
        results = Results(outliers, slow_start, metrics, time.monotonic)
        plans = settings.plans()
        homes = ResponseHomes()
        deadline_s = settings.lookup_deadline_ms / 1000
        self.index = IndexClient(settings.indexers, name, deadline_s, metrics, _interceptors(tracing))
        self.fleet = FleetKeeper(
            self.index,
            settings.engines,
            defaults=settings.engine_defaults(),
            environ=environ,
            refresh_s=settings.engine_refresh_s,
            state_dir=settings.state_dir,
            rng=rng,
        )
        self.tokenizers = Tokenizers(
            files=dict(text.split("=", 1) for text in settings.model_files),
            default_files=settings.model,
            environ=environ,
            api_key=self.fleet.api_key,
            recheck_s=settings.parity_interval_s,
            remote_timeout_s=settings.remote_tokenize_timeout_s,
            metrics=metrics,
        )
        decider = Decider(
            fleet=lambda: self.fleet.fleet,
            tokens=self.tokenizers,
            index=self.index,
            chooser=chooser,
            homes=homes,
            plans=plans,
            clock=time.monotonic,
            problems=LimitedLog(log, DEFECTS_LOG_INTERVAL_S, time.monotonic),
        )
        self._forwarder = Forwarder(_patience(settings), chooser, results, self.fleet.api_key)
        gate = self._gate = Gate(
            Admission(AdmissionRules(settings.queue_max, settings.queue_deadline_s)),
            Pressure(_pressure_rules(settings)),
            decider=decider,
            chooser=chooser,
            loads=self.index.loads,
            metrics=metrics,
            clock=time.monotonic,
        )
        results.on_change = gate.poke
        fail_opens = self._fail_opens = FailOpens()
        self._watch = Watch(self._see, metrics)
        self.index.on_load = gate.load_told
        self._api = PublicApi(
            rules=_rules(settings),
            fleet=lambda: self.fleet.fleet,
            decider=traced_decider(decider, tracing.tracer) if tracing else decider,
            gate=TracedGate(gate, tracing.tracer) if tracing else gate,
            forwarder=TracedForwarder(self._forwarder, tracing.tracer) if tracing else self._forwarder,
            homes=homes,
            metrics=metrics,
            fail_opens=fail_opens,
            observe=self.index.observe,
            new_id=lambda: secrets.token_hex(16),
            started_at=time.time(),
        )
        admin = build_admin(decider, metrics, settings.session_header, settings.body_bytes_max, self._watch.current)
        served = TracedApi(self._api, tracing.tracer) if tracing else self._api
        self._public = HttpServer(served, settings.host, settings.port, settings.drain_s)
        self._admin = HttpServer(admin, settings.admin_host, settings.admin_port, drain_s=1)
        self.fleet.on_change += [
            lambda fleet: chooser.keep_only(fleet.engines.keys()),
            results.fleet_changed,
            gate.fleet_changed,
            metrics.count_engines,
        ]
        if plans.need_prompts:
            self.fleet.on_change.append(self.tokenizers.meet)

    def _see(self) -> Seen:
        return Seen(
            self.fleet.fleet,
            indexers_lost=self.index.lost(),
            indexers_up=len(self.index.fleets()),
            tokens=self.tokenizers.findings(),
            untokenised=self.tokenizers.untokenised(),
            deciding=tuple(self._fail_opens.findings(time.monotonic())),
            reannouncing=self._settings.allow_kv_cache_report_mode,
        )

    @property
    def public_port(self) -> int:
        return self._public.port

    @property
    def admin_port(self) -> int:
        return self._admin.port

    async def start(self) -> None:
        """Raises `OSError` when a port is taken; nothing is left running then."""
        if self._tracing is not None:
            trace_logs()
            self._stack.push_async_callback(self._tracing.close)
        try:
            for part in (self._forwarder, self.index, self.tokenizers, self.fleet, self._watch):
                await self._stack.enter_async_context(part)
            for server in (self._admin, self._public):
                await server.start()
                self._stack.push_async_callback(server.stop)
        except BaseException:
            await self._stack.aclose()
            raise
        log.info("router listens", extra={"port": self.public_port, "admin_port": self.admin_port})

    async def stop(self, drain_delay_s: float = 0.0) -> None:
        """Not ready at once, closed to new requests after `drain_delay_s`, gone when those in flight are answered."""
        self._api.draining = True
        if drain_delay_s:
            log.info("draining", extra={"in_flight": self._api.in_flight})
            await asyncio.sleep(drain_delay_s)  # for load balancers to notice; there is nothing to wait for
        # Who waits in the queue by then would not be answered before the drain is over.
        closing = asyncio.get_running_loop().call_later(self._settings.drain_s / 2, self._gate.close)
        await self._stack.aclose()
        closing.cancel()
        log.info("router stopped")

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; a second one waits for nobody."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        def stop() -> None:
            if asked.is_set():
                self._gate.close()
                self._public.hurry()
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            await self.start()
            keep_what_is_built()
            await asked.wait()
            await self.stop(self._settings.drain_delay_s)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def build(settings: RouterSettings, environ: Mapping[str, str] | None = None) -> Router:
    """`environ` is where engine lists that are read later find the API keys they name."""
    environ = os.environ if environ is None else environ
    return Router(settings, environ, open_tracing(environ, SERVICE))


def _interceptors(tracing: Tracing | None) -> Interceptors:
    if tracing is None:
        return lambda address: ()
    return lambda address: (TracedMatch(tracing.tracer, address),)


def _patience(settings: RouterSettings) -> Patience:
    return Patience(
        connect_s=settings.connect_timeout_s,
        first_byte_s=settings.first_byte_timeout_s,
        idle_s=settings.idle_timeout_s,
        total_s=settings.request_timeout_s,
        attempts=settings.attempts,
    )


def _outlier_rules(settings: RouterSettings) -> OutlierRules:
    return OutlierRules(
        consecutive_max=settings.eject_after,
        ejection_s=settings.ejection_s,
        ejection_max_s=12 * settings.ejection_s,
        ejected_share_max=settings.ejected_share_max,
    )


def _pressure_rules(settings: RouterSettings) -> PressureRules:
    return PressureRules(
        waiting_max=settings.engine_waiting_max,
        kv_usage_max=settings.engine_kv_usage_max,
        in_flight_max=settings.engine_in_flight_max,
    )


def _rules(settings: RouterSettings) -> HttpRules:
    return HttpRules(
        body_bytes_max=settings.body_bytes_max,
        body_timeout_s=settings.body_timeout_s,
        in_flight_max=settings.in_flight_max,
        api_keys=tuple(k.get_secret_value() for k in settings.api_keys),
        session_header=settings.session_header.lower(),
        session_cookie=settings.session_cookie,
        labels_header=settings.labels_header.lower(),
        request_usage=settings.request_usage,
        allow_reannouncing=settings.allow_kv_cache_report_mode,
    )
