"""The indexer's figures for Prometheus, read from the core when somebody scrapes: the core knows nothing of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas_common.findings import Code
from kvatlas_common.fleet import Sync
from kvatlas_common.words import Medium
from kvatlas_indexer.adapters.grpc_server import Observed
from kvatlas_indexer.adapters.zmq_source import Received
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.healing import Healing
from kvatlas_indexer.core.index import KvIndex
from kvatlas_indexer.core.routing import Routing

ENGINES_LABELLED_MAX = 512
"""Engines with series of their own; the figures of those beyond are summed under `engine="other"`."""


class IndexMetrics(Collector):
    def __init__(
        self,
        index: KvIndex,
        accuracy: Accuracy,
        healing: Healing,
        routing: Routing,
        findings: Callable[[], Mapping[Code, int]],
        *,
        received: Received,
        observed: Observed,
    ) -> None:
        self._routing = routing
        self._findings = findings
        self._observed = observed
        self._index = index
        self._accuracy = accuracy
        self._healing = healing
        self._received = received

    def describe(self) -> Iterator[Metric]:
        """Nothing is promised at registration: the engines are not known then."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._engines()
        yield from self._whole()

    def _engines(self) -> Iterator[Metric]:
        name = "kvatlas_indexer_"
        events = CounterMetricFamily(f"{name}events", "KV events by what became of them", labels=["engine", "outcome"])
        blocks = GaugeMetricFamily(f"{name}blocks", "Blocks held, over all groups", labels=["engine", "medium"])
        sync = GaugeMetricFamily(f"{name}engine_sync", "1 for the state the engine is in", labels=["engine", "sync"])
        lag = GaugeMetricFamily(f"{name}event_lag_seconds", "From the engine's clock to applied", labels=["engine"])
        held = GaugeMetricFamily(f"{name}messages_held_back", "Waiting for a replay", labels=["engine"])
        events_of: dict[tuple[str, str], int] = {}
        blocks_of: dict[tuple[str, Medium], int] = {}
        for place, engine in enumerate(self._index.engines()):
            label = str(engine.id) if place < ENGINES_LABELLED_MAX else "other"
            for outcome, count in engine.counts.items():
                events_of[label, outcome] = events_of.get((label, outcome), 0) + count
            for medium, count in engine.blocks().items():
                blocks_of[label, medium] = blocks_of.get((label, medium), 0) + count
            if label != "other":
                for state in Sync:
                    sync.add_metric([label, state], float(engine.sync is state))
                lag.add_metric([label], engine.lag_s)
                held.add_metric([label], engine.stream.held_back)
        for (label, outcome), count in events_of.items():
            events.add_metric([label, outcome], count)
        for (label, medium), count in blocks_of.items():
            blocks.add_metric([label, medium], count)
        yield from (events, blocks, sync, lag, held)

    def _whole(self) -> Iterator[Metric]:
        name = "kvatlas_indexer_"
        refused = CounterMetricFamily(f"{name}messages_refused", "Messages not taken, by reason", labels=["reason"])
        for reason, count in self._index.refused.items():
            refused.add_metric([reason], count)
        yield refused
        findings = GaugeMetricFamily(f"{name}findings", "Engines that something is wrong with, now", labels=["code"])
        for code, engines in self._findings().items():
            findings.add_metric([code], engines)
        yield findings
        yield GaugeMetricFamily(f"{name}keys", "Block keys in the index", value=len(self._index.residency))
        yield GaugeMetricFamily(f"{name}slots_unswept", "Retired slots to sweep", value=self._index.residency.unswept)
        yield CounterMetricFamily(f"{name}messages_received", "KV event messages", value=self._received.messages)
        yield CounterMetricFamily(f"{name}received_bytes", "Bytes of KV event messages", value=self._received.bytes)
        accuracy = self._accuracy
        seen = CounterMetricFamily(f"{name}observations", "What routers told, by kind", labels=["kind"])
        for kind, count in accuracy.seen.items():
            seen.add_metric([kind], count)
        yield seen
        yield CounterMetricFamily(f"{name}observations_refused", "Not understood", value=self._observed.refused)
        yield CounterMetricFamily(
            f"{name}grpc_unreadable", "gRPC requests not readable", value=self._observed.unreadable
        )
        yield CounterMetricFamily(f"{name}predictions_compared", "Held against the engine", value=accuracy.compared)
        yield CounterMetricFamily(f"{name}predictions_equal", "Of those, equal to the token", value=accuracy.equal)
        tokens = CounterMetricFamily(
            f"{name}compared_cached_tokens", "Cached tokens of compared requests", labels=["by"]
        )
        tokens.add_metric(["predicted"], accuracy.predicted_tokens)
        tokens.add_metric(["actual"], accuracy.actual_tokens)
        yield tokens
        differences = CounterMetricFamily(
            f"{name}prediction_differences", "Predictions that were wrong, of own engines, by cause", labels=["cause"]
        )
        for cause, count in self._healing.differences.items():
            differences.add_metric([cause], count)
        healed = CounterMetricFamily(
            f"{name}healed_blocks", "Blocks set right by what engines reported", labels=["how"]
        )
        for how, count in self._healing.healed.items():
            healed.add_metric([how], count)
        yield from (differences, healed)
        yield GaugeMetricFamily(
            f"{name}requests_awaited", "Requests whose end will be compared", value=self._healing.awaited
        )
        routing = self._routing
        yield GaugeMetricFamily(f"{name}requests_in_flight", "Of all routers", value=len(routing.in_flight))
        yield GaugeMetricFamily(f"{name}routers", "Routers that report", value=routing.in_flight.routers)
        yield GaugeMetricFamily(f"{name}requests_predicted", "Not confirmed by events", value=len(routing.predicted))
        yield GaugeMetricFamily(f"{name}estimated_blocks", "In the routing history", value=len(routing.history))
