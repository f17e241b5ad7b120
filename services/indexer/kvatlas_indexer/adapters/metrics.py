"""The indexer's figures for Prometheus, read from the core when somebody scrapes: the core knows nothing of metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas_common.findings import Code
from kvatlas_common.fleet import Sync
from kvatlas_common.tasks import running_tasks
from kvatlas_common.words import Medium
from kvatlas_indexer.adapters.grpc_server import Observed
from kvatlas_indexer.adapters.measured import MeasuredIndex
from kvatlas_indexer.adapters.publisher import Publisher
from kvatlas_indexer.adapters.shared_index import SharedIndex
from kvatlas_indexer.adapters.zmq_source import Received
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.healing import Healing
from kvatlas_indexer.core.index import KvIndex
from kvatlas_indexer.core.routing import Routing

ENGINES_LABELLED_MAX = 512
"""Engines with series of their own; the figures of those beyond are summed under `engine="other"`."""


COUNTED = {
    "messages": ("KV event messages taken up: applied, or had before", ("outcome",)),
    "events": ("KV events by type, and what became of them", ("type", "outcome")),
    "block_changes": ("Blocks told of: stored, removed, or removed without being known", ("change",)),
    "replays_requested": ("Replays asked for: there was a gap, or an engine was met", ()),
    "replays": ("Replays by how they ended", ("end",)),
    "losses": ("Times events were lost for good, and the engine's entries became doubtful", ()),
    "restarts": ("Times an engine began with an empty cache", ()),
}
"""What an engine counts, as families of counters: text, and labels besides `engine`."""
_COUNTED_AS: dict[str, tuple[str, tuple[str, ...]]] = {
    "batch": ("messages", ("applied",)),
    "duplicate": ("messages", ("duplicate",)),
    "event-stored": ("events", ("stored", "applied")),
    "event-removed": ("events", ("removed", "applied")),
    "cleared": ("events", ("cleared", "applied")),
    "stored": ("block_changes", ("stored",)),
    "removed": ("block_changes", ("removed",)),
    "removed-unknown": ("block_changes", ("removed-unknown",)),
    "replay": ("replays_requested", ()),
    "loss": ("losses", ()),
    "restart": ("restarts", ()),
}


def counted_as(outcome: str) -> tuple[str, tuple[str, ...]]:
    """The family and labels of one of an engine's counts."""
    if outcome.startswith("replay-"):
        return "replays", (outcome.removeprefix("replay-"),)
    return _COUNTED_AS.get(outcome, ("events", ("unknown", outcome)))  # a rejection


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
        applying: Durations,
        lookups: MeasuredIndex,
        publisher: Publisher | None = None,
        shared: SharedIndex | None = None,
    ) -> None:
        self._applying = applying
        self._lookups = lookups
        self._publisher = publisher
        self._shared = shared
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
        yield from self._timed()

    def _engines(self) -> Iterator[Metric]:
        name = "kvatlas_indexer_"
        counted = {
            family: CounterMetricFamily(f"{name}{family}", text, labels=["engine", *labels])
            for family, (text, labels) in COUNTED.items()
        }
        blocks = GaugeMetricFamily(f"{name}blocks", "Blocks held, over all groups", labels=["engine", "medium"])
        sync = GaugeMetricFamily(f"{name}engine_sync", "1 for the state the engine is in", labels=["engine", "sync"])
        lag = GaugeMetricFamily(f"{name}event_lag_seconds", "Last message, engine's clock to here", labels=["engine"])
        held = GaugeMetricFamily(f"{name}messages_held_back", "Waiting for a replay", labels=["engine"])
        counts: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
        blocks_of: Counter[tuple[str, Medium]] = Counter()
        for place, engine in enumerate(self._index.engines()):
            label = str(engine.id) if place < ENGINES_LABELLED_MAX else "other"
            for outcome, count in engine.counts.items():
                family, labels = counted_as(outcome)
                counts[family, label, labels] += count
            for medium, count in engine.blocks().items():
                blocks_of[label, medium] += count
            if label != "other":
                for state in Sync:
                    sync.add_metric([label, state], float(engine.sync is state))
                lag.add_metric([label], engine.lag_s)
                held.add_metric([label], engine.stream.held_back)
        for (family, label, labels), count in counts.items():
            counted[family].add_metric([label, *labels], count)
        for (label, medium), count in blocks_of.items():
            blocks.add_metric([label, medium], count)
        yield from (*counted.values(), blocks, sync, lag, held)

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
        yield GaugeMetricFamily(f"{name}asyncio_tasks", "asyncio tasks of the process", value=running_tasks())
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
            f"{name}grpc_too_late", "gRPC answers nobody waited for any more", value=self._observed.too_late
        )
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

    def _timed(self) -> Iterator[Metric]:
        name = "kvatlas_indexer_"
        yield _histogram(f"{name}event_delay_seconds", "From a batch's own time to its arrival", self._index.delays)
        yield _histogram(f"{name}event_apply_seconds", "From arrival to visible in this shard", self._applying)
        yield _histogram(f"{name}lookup_seconds", "Lookups, whatever their result", self._lookups.durations)
        lookups = CounterMetricFamily(f"{name}lookups", "Lookups by result", labels=["result"])
        for result, count in self._lookups.results.items():
            lookups.add_metric([result], count)
        yield lookups
        if self._publisher is None or self._shared is None:
            return  # the index is in memory
        yield _histogram(
            f"{name}store_write_seconds",
            "From a change here to the store: visible in all shards",
            self._publisher.writes,
        )
        errors = CounterMetricFamily(f"{name}store_errors", "Times the store could not be asked", labels=["operation"])
        errors.add_metric(["write"], self._publisher.errors)
        errors.add_metric(["read-fleet"], self._shared.errors)
        errors.add_metric(["lookup"], self._lookups.results["unavailable"])
        yield errors


def _histogram(name: str, text: str, durations: Durations) -> HistogramMetricFamily:
    buckets = [(_bound(bound), float(count)) for bound, count in durations.cumulative()]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=durations.sum_s)


def _bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else repr(seconds)
