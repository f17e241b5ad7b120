"""The settings that the manifests start the services with, read by the services' own loaders."""

from __future__ import annotations

from pathlib import Path

from kvatlas_common.settings import load
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_router.settings import RouterSettings
from tests.unit.deploy.manifests import Manifests, Workload


def indexer_settings(manifests: Manifests, folder: Path) -> tuple[Workload, IndexerSettings]:
    """`folder`: where the mounted files are laid out."""
    workload = manifests.workload("kvatlas-indexer")
    command, *arguments = manifests.started(workload, folder)
    assert command == "indexer"
    return workload, IndexerSettings.load(arguments, workload.environ)


def router_settings(manifests: Manifests, folder: Path) -> tuple[Workload, RouterSettings]:
    workload = manifests.workload("kvatlas-router")
    command, *arguments = manifests.started(workload, folder)
    assert command == "router"
    return workload, load(RouterSettings, arguments, workload.environ, prog="kvatlas router")
