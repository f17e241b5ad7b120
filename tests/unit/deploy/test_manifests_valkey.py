"""The Valkey of the `ha` overlay never drops an entry, and fits into its container."""

from __future__ import annotations

import shlex

import pytest

from kvatlas_indexer.adapters.redis_url import StoreUrl
from tests.unit.deploy.manifests import SECRETS, rendered

UNITS = {"gb": 1 << 30, "mb": 1 << 20, "Gi": 1 << 30, "Mi": 1 << 20}
ROOM = 1.25
"""Of the limit over `maxmemory`: clients' buffers and fragmentation are beside it."""


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def config() -> dict[str, str]:
    (found,) = (c for c in rendered("ha").of_kind("ConfigMap") if "valkey.conf" in c["data"])
    lines = [shlex.split(line, comments=True) for line in found["data"]["valkey.conf"].splitlines()]
    return {line[0]: " ".join(line[1:]) for line in lines if line}


def test_it_evicts_nothing_and_keeps_nothing_on_disk() -> None:
    assert config()["maxmemory-policy"] == "noeviction"
    assert (config()["save"], config()["appendonly"]) == ("", "no")


def test_its_memory_is_bounded_before_its_container_is() -> None:
    limit = rendered("ha").workload("kvatlas-valkey").container["resources"]["limits"]["memory"]
    assert size(config()["maxmemory"]) * ROOM <= size(limit)


def test_it_asks_for_the_password_that_the_shards_have() -> None:
    valkey = rendered("ha").workload("kvatlas-valkey")
    secret = SECRETS["kvatlas-store"]
    assert valkey.arguments == ["/etc/valkey/valkey.conf", "--requirepass", secret["password"]]
    assert valkey.environ["REDISCLI_AUTH"] == secret["password"]
    store = StoreUrl.parse(rendered("ha").workload("kvatlas-indexer").environ["KVATLAS_STORE"])
    ((host, port),) = store.addresses
    assert store.password == secret["password"]
    service = rendered("ha").get("Service", host, valkey.namespace)["spec"]
    assert rendered("ha").selected(service["selector"], valkey.namespace) == (valkey,)
    assert [p["port"] for p in service["ports"]] == [port] == list(valkey.ports.values())


@pytest.mark.parametrize("name", ["base", "ha-external", "replay", "ha-dial"])
def test_nobody_has_it_who_did_not_ask(name: str) -> None:
    assert "kvatlas-valkey" not in {workload.name for workload in rendered(name).workloads}
