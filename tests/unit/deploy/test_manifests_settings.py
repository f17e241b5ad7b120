"""Containers are started with settings that the services take without a problem or a warning, and that fit around them:
ports, addresses, and the time a stop may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas_cli.__main__ import SERVICES
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_router.adapters.index_client import RESOLVE_EVERY_S
from tests.unit.deploy.manifests import SECRETS, rendered
from tests.unit.deploy.rendering import INDEX
from tests.unit.deploy.services import indexer_settings, router_settings

STOPPING_S = 10.0
"""To close what is left after the drains, and to be scheduled on a busy node."""
NAME_SERVERS_REMEMBER_S = 5.0
"""The time to live of a headless Service's addresses, by CoreDNS's default."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


SHARED = [name for name in INDEX if "KVATLAS_STORE" in rendered(name).workload("kvatlas-indexer").environ]
WITHOUT_STORE = pytest.mark.xfail(
    "store" not in IndexerSettings.model_fields, reason="the indexer's --store is on its way", strict=True
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=WITHOUT_STORE) if n in SHARED else n for n in INDEX])
def test_the_services_take_their_settings_without_a_word(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indexer_settings(rendered(name), tmp_path / "indexer")
    router_settings(rendered(name), tmp_path / "router")
    assert capsys.readouterr().err == ""
    assert {"indexer", "router"} <= SERVICES.keys()


@pytest.mark.parametrize("name", INDEX)
def test_the_indexer_listens_where_its_ports_say(name: str, tmp_path: Path) -> None:
    workload, settings = indexer_settings(rendered(name), tmp_path)
    assert settings.grpc_listen == f"0.0.0.0:{workload.ports['grpc']}"
    assert settings.zmq_listen == (f"tcp://*:{workload.ports['events']}",)
    assert settings.listen_ranks == 1
    host, _, port = settings.rest_listen.rpartition(":")
    assert (host in LOOPBACK) == ("metrics" not in workload.ports)
    assert int(port) == workload.ports.get("metrics", int(port))


@pytest.mark.parametrize("name", INDEX)
def test_the_router_listens_where_its_ports_say(name: str, tmp_path: Path) -> None:
    workload, settings = router_settings(rendered(name), tmp_path)
    assert (settings.host, settings.port) == ("0.0.0.0", workload.ports["http"])
    assert (settings.admin_host in LOOPBACK) == ("metrics" not in workload.ports)
    assert settings.admin_port == workload.ports.get("metrics", settings.admin_port)


@pytest.mark.parametrize("name", INDEX)
def test_the_router_asks_a_name_that_stands_for_every_shard(name: str, tmp_path: Path) -> None:
    workload, settings = router_settings(rendered(name), tmp_path)
    (indexer,) = settings.indexers
    host, _, port = indexer.rpartition(":")
    service = rendered(name).get("Service", host, workload.namespace)["spec"]
    assert service["clusterIP"] == "None"
    assert rendered(name).selected(service["selector"], workload.namespace) == (
        rendered(name).workload("kvatlas-indexer"),
    )
    # There is no translation of ports behind a headless name.
    assert [rendered(name).workload("kvatlas-indexer").ports[p["targetPort"]] for p in service["ports"]] == [int(port)]


@pytest.mark.parametrize("name", INDEX)
def test_the_router_keeps_its_fleet_where_it_may_write(name: str, tmp_path: Path) -> None:
    workload, settings = router_settings(rendered(name), tmp_path)
    (mount,) = (mount for mount in workload.container["volumeMounts"] if not mount.get("readOnly"))
    assert str(settings.state_dir) == mount["mountPath"]
    (volume,) = (volume for volume in workload.pod["volumes"] if volume["name"] == mount["name"])
    assert "emptyDir" in volume
    assert workload.pod["securityContext"]["fsGroup"] == workload.pod["securityContext"]["runAsGroup"]


@pytest.mark.parametrize("name", INDEX)
def test_nobody_is_killed_while_draining(name: str, tmp_path: Path) -> None:
    workload, indexer = indexer_settings(rendered(name), tmp_path / "indexer")
    rest_s = 5.0  # `grace_s` of its HTTP server
    assert workload.pod["terminationGracePeriodSeconds"] >= indexer.drain_s + rest_s + STOPPING_S
    workload, router = router_settings(rendered(name), tmp_path / "router")
    assert workload.pod["terminationGracePeriodSeconds"] >= router.drain_delay_s + router.drain_s + STOPPING_S
    assert router.drain_delay_s >= 5, "nodes take seconds to hear that a pod ends"


@pytest.mark.parametrize("name", INDEX)
def test_a_new_shard_is_found_before_the_next_one_goes(name: str) -> None:
    spec = rendered(name).workload("kvatlas-indexer").object["spec"]
    assert spec["minReadySeconds"] >= RESOLVE_EVERY_S + NAME_SERVERS_REMEMBER_S
    strategy = rendered(name).workload("kvatlas-router").object["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.parametrize("name", INDEX)
def test_several_shards_share_a_store_that_a_secret_names(name: str) -> None:
    workload = rendered(name).workload("kvatlas-indexer")
    (entry,) = [e for e in workload.container.get("env", ()) if e["name"] == "KVATLAS_STORE"] or [None]
    assert (entry is not None) == (workload.object["spec"]["replicas"] > 1)
    if entry is not None:
        assert entry["valueFrom"] == {"secretKeyRef": {"name": "kvatlas-store", "key": "url"}}
    for config in rendered(name).of_kind("ConfigMap"):
        assert not any(
            secret in text for text in config["data"].values() for secret in SECRETS["kvatlas-store"].values()
        )
