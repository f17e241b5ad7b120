"""Names, labels, ports and probes of one object mean something in another, and in the services' own settings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

import pytest

from tests.unit.deploy.manifests import SECRETS, Manifests, Workload, rendered
from tests.unit.deploy.rendering import INDEX, ROOT, SOURCES


def every_workload(*names: str) -> Iterator[tuple[str, Manifests, Workload]]:
    for name in names or SOURCES:
        for workload in rendered(name).workloads:
            yield f"{name}: {workload.name}", rendered(name), workload


def test_workloads_select_their_own_pods() -> None:
    for where, manifests, workload in every_workload():
        selector = workload.object["spec"]["selector"]["matchLabels"]
        assert manifests.selected(selector, workload.namespace) == (workload,), where


@pytest.mark.parametrize("name", SOURCES)
def test_services_lead_to_ports_of_one_workload(name: str) -> None:
    for service in rendered(name).of_kind("Service"):
        spec = service["spec"]
        (workload,) = rendered(name).selected(spec["selector"], service["metadata"]["namespace"])
        for port in spec["ports"]:
            assert workload.ports[port["targetPort"]] == port["port"], service["metadata"]["name"]


def test_a_stateful_set_has_the_service_it_names() -> None:
    for where, manifests, workload in every_workload():
        if workload.object["kind"] == "StatefulSet":
            service = manifests.get("Service", workload.object["spec"]["serviceName"], workload.namespace)
            assert manifests.selected(service["spec"]["selector"], workload.namespace) == (workload,), where


@pytest.mark.parametrize("name", INDEX)
def test_disruption_budgets_keep_each_service_up_without_holding_up_a_drain(name: str) -> None:
    budgets = list(rendered(name).of_kind("PodDisruptionBudget"))
    selected = [
        rendered(name).selected(budget["spec"]["selector"]["matchLabels"], budget["metadata"]["namespace"])
        for budget in budgets
    ]
    assert [[workload.name for workload in found] for found in selected] == [["kvatlas-indexer"], ["kvatlas-router"]]
    assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)


def test_probes_ask_a_port_that_the_container_has() -> None:
    for where, _, workload in every_workload():
        assert "readinessProbe" in workload.probes, where
        for probe in workload.probes.values():
            for way in ("httpGet", "grpc", "tcpSocket"):
                if way in probe:
                    assert workload.port(probe[way]["port"]) in workload.ports.values(), where


def test_a_restart_takes_longer_to_be_decided_than_a_pause_of_readiness() -> None:
    def decided_s(probe: dict[str, int]) -> int:
        return probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)

    for where, _, workload in every_workload():
        if "livenessProbe" in workload.probes:
            assert decided_s(workload.probes["livenessProbe"]) >= 60, where
            assert decided_s(workload.probes["livenessProbe"]) > decided_s(workload.probes["readinessProbe"]), where
            assert decided_s(workload.probes["startupProbe"]) >= 60, where


def test_mounts_volumes_secrets_and_accounts_exist() -> None:
    for where, manifests, workload in every_workload():
        volumes = {volume["name"]: volume for volume in workload.pod["volumes"]}
        assert {mount["name"] for mount in workload.container["volumeMounts"]} == volumes.keys(), where
        for volume in volumes.values():
            if "configMap" in volume:
                manifests.get("ConfigMap", volume["configMap"]["name"], workload.namespace)
        if "serviceAccountName" in workload.pod:
            account = manifests.get("ServiceAccount", workload.pod["serviceAccountName"], workload.namespace)
            assert account["automountServiceAccountToken"] is False
        for entry in workload.container.get("env", ()):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            assert reference is None or reference["key"] in SECRETS[reference["name"]], where


def test_images_are_pinned_and_ours_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for where, _, workload in every_workload():
        name, colon, tag = workload.container["image"].rpartition(":")
        assert colon, where
        assert tag not in ("latest", "nightly"), where
        assert name != "kvatlas" or tag == version, where


def test_pods_of_ours_keep_to_the_restricted_standard() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, which the namespace enforces."""
    for where, manifests, workload in every_workload(*INDEX):
        (namespace,) = manifests.of_kind("Namespace")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        pod, container = workload.pod["securityContext"], workload.container["securityContext"]
        assert pod["runAsNonRoot"] is True, where
        assert pod["runAsUser"] > 0, where
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert container["allowPrivilegeEscalation"] is False, where
        assert container["capabilities"] == {"drop": ["ALL"]}, where
        assert container["readOnlyRootFilesystem"] is True, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & workload.pod.keys(), where
        assert all(not {"hostPort"} & port.keys() for port in workload.container["ports"]), where
        assert all({"configMap", "emptyDir"} & volume.keys() for volume in workload.pod["volumes"]), where


def test_every_container_asks_for_what_it_needs_and_is_bounded_in_memory() -> None:
    for where, _, workload in every_workload():
        resources = workload.container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys(), where
        assert "memory" in resources["limits"], where
        assert "cpu" not in resources["limits"], f"{where}: it would throttle"


def test_no_pod_is_told_of_services_through_variables() -> None:
    """A Service `kvatlas-store` would make KVATLAS_STORE_PORT of it, and one named vllm VLLM_PORT."""
    for where, _, workload in every_workload():
        assert workload.pod["enableServiceLinks"] is False, where
        assert workload.pod["automountServiceAccountToken"] is False, where


def test_replicas_are_spread_over_nodes_and_zones() -> None:
    for where, _, workload in every_workload(*INDEX):
        if workload.name == "kvatlas-valkey":
            continue
        spread = workload.pod["topologySpreadConstraints"]
        assert [constraint["topologyKey"] for constraint in spread] == [
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        ], where
        selector = workload.object["spec"]["selector"]
        assert all(constraint["labelSelector"] == selector for constraint in spread), where


@pytest.mark.parametrize(
    ("name", "indexers", "routers"), [("base", 1, 2), ("ha", 3, 3), ("ha-external", 3, 3), ("ha-dial", 3, 3)]
)
def test_how_many_there_are(name: str, indexers: int, routers: int) -> None:
    counts = {workload.name: workload.object["spec"]["replicas"] for workload in rendered(name).workloads}
    assert (counts["kvatlas-indexer"], counts["kvatlas-router"]) == (indexers, routers)
    assert counts.get("kvatlas-valkey", 1) == 1, "two would hold one half of the index each"
