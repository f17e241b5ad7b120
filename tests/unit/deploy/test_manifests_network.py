"""Who may connect to what. KV events, gRPC and the store trust whoever reaches them: only those who must, may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.unit.deploy.manifests import Manifests, Workload, rendered
from tests.unit.deploy.rendering import ENGINES, INDEX

ANYBODY = "anybody"
ROUTERS = {"app.kubernetes.io/name": "kvatlas", "app.kubernetes.io/component": "router"}
INDEXERS = {"app.kubernetes.io/name": "kvatlas", "app.kubernetes.io/component": "indexer"}


def reachable(manifests: Manifests, workload: Workload) -> dict[str, list[Any]]:
    """Port name -> the peers that the policies of these pods let in."""
    policies = manifests.policies_of(workload)
    assert policies, f"{workload.name}: open to all"
    found: dict[str, list[Any]] = {}
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            for port in rule["ports"]:
                if port["port"] in workload.ports:  # a named port that a pod lacks opens nothing
                    found.setdefault(port["port"], []).extend(rule.get("from", [ANYBODY]))
    return found


@pytest.mark.parametrize("name", INDEX)
def test_the_public_port_is_open_and_the_others_are_not(name: str) -> None:
    manifests = rendered(name)
    indexer = reachable(manifests, manifests.workload("kvatlas-indexer"))
    router = reachable(manifests, manifests.workload("kvatlas-router"))
    assert indexer["events"] == [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"kvatlas-engine": "true"}}}]
    assert indexer["grpc"] == [{"podSelector": {"matchLabels": ROUTERS}}]
    assert router["http"] == [ANYBODY]
    assert ("metrics" in indexer, "metrics" in router) == (name == "ha-metrics",) * 2
    assert set(indexer) | set(router) <= {"events", "grpc", "http", "metrics"}


def test_metrics_are_for_the_namespace_of_prometheus() -> None:
    manifests = rendered("ha-metrics")
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for name in ("kvatlas-indexer", "kvatlas-router"):
        workload = manifests.workload(name)
        assert reachable(manifests, workload)["metrics"] == peers
        annotations: Mapping[str, str] = workload.template["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert int(annotations["prometheus.io/port"]) == workload.ports["metrics"]
        assert annotations["prometheus.io/path"] == "/metrics"


@pytest.mark.parametrize("name", ["ha", "ha-metrics"])
def test_only_indexers_reach_the_store(name: str) -> None:
    manifests = rendered(name)
    assert reachable(manifests, manifests.workload("kvatlas-valkey")) == {
        "valkey": [{"podSelector": {"matchLabels": INDEXERS}}]
    }


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_let_in_by_their_label(name: str) -> None:
    (engine,) = rendered(name).workloads
    (policy,) = (
        policy
        for policy in rendered("base").policies_of(rendered("base").workload("kvatlas-indexer"))
        if any({"port": "events"} in rule["ports"] for rule in policy["ingress"])
    )
    (peers,) = (rule["from"] for rule in policy["ingress"] if {"port": "events"} in rule["ports"])
    (peer,) = peers
    assert peer["podSelector"]["matchLabels"].items() <= engine.labels.items()
