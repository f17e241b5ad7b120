"""What docs/deploy.md says of files, ports and times is so."""

from __future__ import annotations

import re
from pathlib import Path

from tests.unit.deploy.manifests import SECRETS, rendered
from tests.unit.deploy.rendering import K8S, ROOT
from tests.unit.deploy.services import indexer_settings, router_settings

TEXT = (ROOT / "docs" / "deploy.md").read_text("utf-8")


def test_every_file_named_is_there() -> None:
    named = set(re.findall(r"\bdeploy/(?:docker|k8s)[\w/.-]*\w", TEXT))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_folder_to_apply_is_named() -> None:
    tables = {path.parent.name for path in K8S.rglob("kustomization.yaml")} - {"store", "valkey"}  # parts of overlays
    assert [name for name in sorted(tables) if not re.search(rf"/{name}\b", TEXT)] == []


def test_the_secret_has_the_keys_that_are_asked_for() -> None:
    assert set(re.findall(r"--from-literal=(\w+)=", TEXT)) == SECRETS["kvatlas-store"].keys()


def test_times_and_ports_are_those_of_the_manifests(tmp_path: Path) -> None:
    indexer_pod, indexer = indexer_settings(rendered("base"), tmp_path / "indexer")
    router_pod, router = router_settings(rendered("base"), tmp_path / "router")
    rows = {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in TEXT.splitlines())}
    assert f"for {router.drain_delay_s:g} s" in rows["router"][1]
    assert f"have {router.drain_s:g} s" in rows["router"][1]
    assert rows["router"][2] == f"{router_pod.pod['terminationGracePeriodSeconds']} s"
    assert f"have {indexer.drain_s:g} s" in rows["indexer"][1]
    assert rows["indexer"][2] == f"{indexer_pod.pod['terminationGracePeriodSeconds']} s"
    ports = {*rendered("ha-metrics").workload("kvatlas-indexer").ports.values()}
    ports |= {*rendered("ha-metrics").workload("kvatlas-router").ports.values()}
    ports |= {*rendered("ha-metrics").workload("kvatlas-valkey").ports.values()}
    assert {int(cell) for cell in rows if cell.isdecimal()} == ports
