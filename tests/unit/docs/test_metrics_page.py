"""docs/metrics.md lists what the registries hold, no more and no less. `pytest --rewrite` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from kvatlas_common.findings import Code
from kvatlas_common.fleet import Health, Sync
from kvatlas_common.observations import Outcome
from kvatlas_indexer.adapters.grpc_server import Observed
from kvatlas_indexer.adapters.measured import MeasuredIndex
from kvatlas_indexer.adapters.metrics import IndexMetrics
from kvatlas_indexer.adapters.zmq_source import Received
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.durations import Durations
from kvatlas_indexer.core.healing import Healing
from kvatlas_indexer.core.index import KvIndex
from kvatlas_indexer.core.routing import Routing
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.admission import Cause
from kvatlas_router.core.choice import Strategy
from kvatlas_router.core.outliers import Fault
from kvatlas_router.core.prompt import Where

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
HEAD = """# Metrics

Prometheus reads the router's at `:8082/metrics`, the indexer's at `:8081/metrics` (loopback unless told otherwise; on
Kubernetes the component `deploy/k8s/components/metrics` opens both); `deploy/prometheus/alerts.yaml` has rules to begin
with. Besides these, both have the client library's `process_*`. The values of every label come from a closed set, or
from the fleet (`engine`, at most 512, the rest summed as `other`; `model`).

This page is written by `pytest tests/unit/docs --rewrite` from the registries, and a test holds it to them.
"""
VALUES: dict[str, type[StrEnum]] = {
    "kvatlas_router_requests_total outcome": Outcome,
    "kvatlas_router_choices_total strategy": Strategy,
    "kvatlas_router_retries_total why": Fault,
    "kvatlas_router_shed_total cause": Cause,
    "kvatlas_router_tokenised_total where": Where,
    "kvatlas_router_engines health": Health,
    "kvatlas_indexer_engine_sync sync": Sync,
    "kvatlas_indexer_findings code": Code,
}
ALERTS = Path(__file__).parents[3] / "deploy" / "prometheus" / "alerts.yaml"
NAME = re.compile(r"kvatlas_[a-z_]+")


def router() -> Iterator[tuple[Metric, tuple[str, ...]]]:
    metrics = Metrics()
    labels = {
        family.name: tuple(made._labelnames)
        for made in vars(metrics).values()
        if isinstance(made, MetricWrapperBase)
        for family in made.describe()
    }
    return ((family, labels.get(family.name, _labels(family))) for family in ours(metrics.registry))


def indexer() -> Iterator[tuple[Metric, tuple[str, ...]]]:
    index, registry = KvIndex(on_finding=lambda engine, finding: None), CollectorRegistry()
    registry.register(
        IndexMetrics(
            index,
            Accuracy(),
            Healing(index, on_finding=lambda engine, finding: None),
            Routing(estimate_ttl_s=60),
            lambda: {},
            received=Received(),
            observed=Observed(),
            applying=Durations(),
            lookups=MeasuredIndex(cast(Any, None)),
            publisher=cast(Any, SimpleNamespace(writes=Durations(), errors=0)),
            shared=cast(Any, SimpleNamespace(errors=0)),
        )
    )
    return ((family, _labels(family)) for family in ours(registry))


def ours(registry: CollectorRegistry) -> Iterator[Metric]:
    return (family for family in registry.collect() if family.name.startswith("kvatlas_"))


def _labels(family: Metric) -> tuple[str, ...]:
    return tuple(getattr(family, "_labelnames", ()))


def table(title: str, families: Iterable[tuple[Metric, tuple[str, ...]]]) -> str:
    lines = [f"## {title}", "", "| name | type | labels | what |", "|---|---|---|---|"]
    for family, labels in sorted(families, key=lambda found: found[0].name):
        name = family.name + ("_total" if family.type == "counter" else "")
        what = family.documentation.replace("|", "/")
        lines.append(f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {what} |")
    return "\n".join(lines)


def page() -> str:
    values = ["## Values of labels", "", "| label | values |", "|---|---|"]
    values += [f"| `{name}` | {', '.join(f'`{value}`' for value in of)} |" for name, of in VALUES.items()]
    return (
        "\n\n".join((HEAD.rstrip(), table("Router", router()), table("Indexer", indexer()), "\n".join(values))) + "\n"
    )


def test_the_page_lists_what_there_is(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--rewrite"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "docs/metrics.md is stale: pytest tests/unit/docs --rewrite"


def test_names_are_as_prometheus_wants_them() -> None:
    for family, labels in (*router(), *indexer()):
        assert family.documentation
        assert not family.name.endswith("_ms"), "seconds"
        assert family.type != "histogram" or family.name.endswith("_seconds")
        assert not {"prompt", "request_id", "session", "key"} & set(labels), "a label without bounds"


def test_labels_that_are_listed_exist() -> None:
    there = {
        f"{family.name}{'_total' if family.type == 'counter' else ''} {label}"
        for family, labels in (*router(), *indexer())
        for label in labels
    }
    assert set(VALUES) <= there


def test_alerts_ask_for_what_there_is() -> None:
    there: set[str] = set()
    for family, _ in (*router(), *indexer()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        there |= {family.name + suffix for suffix in suffixes}
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    asked = {name for group in groups for rule in group["rules"] for name in NAME.findall(rule["expr"])}
    assert asked
    assert asked <= there
