"""The router's figures for Prometheus. Labels come from closed sets or from the fleet, so their number is bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from kvatlas_common.fleet import Fleet, Health
from kvatlas_common.tasks import running_tasks

_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
"""In seconds; one of them is the default deadline of a lookup."""
_COARSE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One registry per router, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"kvatlas_router_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"kvatlas_router_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"kvatlas_router_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "requests answered, by path and how they ended", ("path", "outcome"))
        self.refused = counter("refused", "requests the router answered itself with an error", ("status",))
        self.choices = counter("choices", "choices made, by strategy", ("strategy",))
        self.fail_open = counter("fail_open", "requests not routed precisely, by cause", ("cause",))
        self.retries = counter("retries", "requests tried again elsewhere, by what failed", ("why",))
        self.cuts = counter("cuts", "responses cut off after their first byte")
        self.in_flight = gauge("in_flight", "requests being answered")
        self.queued = gauge("queue_requests", "requests that wait because every engine of their model is saturated")
        self.queue_wait = histogram("queue_wait_seconds", "how long requests waited, those turned away too", _COARSE)
        self.shed = counter("shed", "requests turned away, by cause", ("cause",))
        self.ejected = gauge("ejected_engines", "engines that failed too often and are tried last for a while")
        self.ejections = counter("ejections", "engines ejected, by cause", ("cause",))
        self.stages = histogram("decision_seconds", "time of a decision, by stage", _FINE, ("stage",))
        self.first_byte = histogram("first_byte_seconds", "request received to first byte sent", _COARSE)
        self.request_seconds = histogram(
            "request_seconds", "request received to its last byte sent, by path", _COARSE, ("path",)
        )
        self.prompt_tokens = counter("prompt_tokens", "prompt tokens of comparable requests")
        self.predicted_tokens = counter("predicted_cached_tokens", "cached tokens predicted, comparable requests")
        self.actual_tokens = counter("actual_cached_tokens", "cached tokens the engines reported, comparable requests")
        self.mismatches = counter("prediction_mismatches", "comparable requests predicted otherwise than reported")
        self.compared = counter("predictions_compared", "comparable requests whose engine reported cached tokens")
        self.tokenised = counter("tokenised", "prompts tokenised, and where", ("where",))
        self.parity = counter("parity_mismatches", "checks of local tokens against an engine that differed", ("model",))
        self.encoder_differences = counter(
            "encoder_differences", "fast encoders found to give other tokens, and stopped"
        )
        self.lookups = counter("lookups", "index lookups by result", ("result",))
        self.shards_up = gauge("indexers_up", "indexer shards whose fleet stream is up")
        self.observations_dropped = counter("observations_dropped", "observations dropped because a shard is slow")
        self.findings = gauge("findings", "what something is wrong with now, by what is wrong", ("code",))
        self.engines = gauge("engines", "engines of the fleet, by health", ("health",))
        self.tasks = gauge("asyncio_tasks", "asyncio tasks of the process")
        self.tasks.set_function(running_tasks)

    def count_engines(self, fleet: Fleet) -> None:
        for health in Health:
            self.engines.labels(health).set(sum(v.health is health for v in fleet.engines.values()))

    def chosen(self, strategy: str, cause: str | None) -> None:
        """A cause is counted by its first part: `unrenderable:<why>` as `unrenderable`."""
        self.choices.labels(strategy).inc()
        if cause is not None:
            self.fail_open.labels(cause.partition(":")[0]).inc()

    def compare(self, prompt_tokens: int, predicted: int, actual: int) -> None:
        self.compared.inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.predicted_tokens.inc(predicted)
        self.actual_tokens.inc(actual)
        if predicted != actual:
            self.mismatches.inc()
