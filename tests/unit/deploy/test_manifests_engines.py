"""The reference vLLM Deployment: what it publishes reaches the index, under a name that leads back to it.

vLLM 0.32: config/kv_events.py has the fields of `--kv-events-config`; a PUB that names a host connects, one with `*`
binds (distributed/kv_events.py, `_socket_setup`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest

from kvatlas_common.engines.specs import DnsName, EngineSource, EngineSpec
from kvatlas_common.events.decode import decode_topic
from kvatlas_common.settings import HashAlgo
from tests.unit.deploy.manifests import POD_IP, Manifests, Workload, rendered
from tests.unit.deploy.rendering import ENGINES
from tests.unit.deploy.services import indexer_settings, router_settings

KNOWN_FIELDS = {
    "enable_kv_cache_events",
    "publisher",
    "endpoint",
    "replay_endpoint",
    "buffer_steps",
    "hwm",
    "max_queue_size",
    "topic",
}
MODEL = "Qwen3-32B"


def engine(name: str) -> Workload:
    (found,) = rendered(name).workloads
    return found


def flags(workload: Workload) -> dict[str, str]:
    return dict(argument.removeprefix("--").partition("=")[::2] for argument in workload.arguments)


def events(workload: Workload) -> dict[str, Any]:
    config = json.loads(flags(workload)["kv-events-config"])
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_the_reference_set_up(name: str) -> None:
    workload = engine(name)
    said = flags(workload)
    assert workload.object["spec"]["replicas"] == 3
    assert said["model"] == "Qwen/Qwen3-32B"
    assert said["served-model-name"] == MODEL
    assert (said["block-size"], said["max-model-len"], said["port"]) == ("64", "8192", "8000")
    assert said["prefix-caching-hash-algo"] in get_args(HashAlgo)
    assert workload.environ["PYTHONHASHSEED"] == "42"
    assert workload.ports["http"] == int(said["port"])


@pytest.mark.parametrize("name", ENGINES)
def test_its_topic_names_the_address_that_requests_are_sent_to(name: str, tmp_path: Path) -> None:
    workload = engine(name)
    config = events(workload)
    assert config.keys() <= KNOWN_FIELDS
    assert config["enable_kv_cache_events"] is True
    topic = decode_topic(config["topic"].encode())
    assert (topic.host, topic.model) == (POD_IP, MODEL)
    _, settings = indexer_settings(rendered("base"), tmp_path)
    assert (topic.port or settings.engine_port) == workload.ports["http"]


@pytest.mark.parametrize("name", ["vllm-connect", "vllm-replay"])
def test_it_connects_to_the_events_of_the_index(name: str) -> None:
    endpoint = urlsplit(events(engine(name))["endpoint"])
    assert endpoint.hostname is not None
    service, namespace, svc = endpoint.hostname.split(".")
    assert svc == "svc"
    spec = rendered("base").get("Service", service, namespace)["spec"]
    assert rendered("base").selected(spec["selector"], namespace) == (rendered("base").workload("kvatlas-indexer"),)
    assert [(port["name"], port["port"]) for port in spec["ports"]] == [("events", endpoint.port)]


PAIRS = [("vllm-connect", "base"), ("vllm-connect", "ha"), ("vllm-replay", "replay"), ("vllm-dial", "ha-dial")]


def listed(engines: tuple[EngineSource, ...], workload: Workload, manifests: Manifests) -> EngineSpec:
    """What a list of one name says of the engine at `POD_IP`. The name must stand for every engine, ready or not: one
    that is not ready for a moment would be forgotten, and its health is asked of itself."""
    (source,) = engines
    assert isinstance(source, DnsName)
    service, namespace, svc = source.host.split(".")
    assert svc == "svc"
    spec = manifests.get("Service", service, namespace)["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert manifests.selected(spec["selector"], namespace) == (workload,)
    return source.at(POD_IP)


@pytest.mark.parametrize(("engines", "index"), PAIRS)
def test_the_index_and_the_routers_find_the_engines(engines: str, index: str, tmp_path: Path) -> None:
    """An engine says nothing before its first request, which nobody sends to an engine that nobody knows."""
    workload = engine(engines)
    _, indexer = indexer_settings(rendered(index), tmp_path / "indexer")
    _, router = router_settings(rendered(index), tmp_path / "router")
    for settings in (indexer, router):
        found = listed(settings.engines, workload, rendered(engines))
        assert found.address == f"{POD_IP}:{workload.ports['http']}"


@pytest.mark.parametrize(("engines", "index"), PAIRS)
def test_the_index_dials_the_ports_that_engines_bind(engines: str, index: str, tmp_path: Path) -> None:
    workload = engine(engines)
    _, settings = indexer_settings(rendered(index), tmp_path)
    found = listed(settings.engines, workload, rendered(engines))
    config = events(workload)
    for said, dialled, port in (
        (config["endpoint"], found.events, "events"),
        (config.get("replay_endpoint", ""), found.replay, "replay"),
    ):
        if "*" in said:
            assert dialled == said.replace("*", POD_IP)
            assert workload.ports[port] == int(said.rpartition(":")[2])
        else:
            assert dialled is None
            assert port not in workload.ports
