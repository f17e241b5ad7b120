"""Rendered manifests, and what Kubernetes would make of them: who selects whom, what a container is started with.

Only rules of Kubernetes are here; what must be true of our manifests is in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tests.unit.deploy.rendering import RENDERED

Object = dict[str, Any]
POD_IP = "10.1.2.3"
SECRETS = {
    "kvatlas-store": {"url": "redis://:a-password@kvatlas-valkey:6379/0", "password": "a-password"},
    "hugging-face": {"token": "a-token"},
}
"""Secrets that a deployment is told to make, with all their keys."""


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet of one container."""

    object: Object

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.object["metadata"]["namespace"])

    @property
    def template(self) -> Object:
        template: Object = self.object["spec"]["template"]
        return template

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def pod(self) -> Object:
        pod: Object = self.template["spec"]
        return pod

    @property
    def container(self) -> Object:
        (container,) = self.pod["containers"]
        assert isinstance(container, dict)
        return container

    @cached_property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def port(self, named: str | int) -> int:
        return self.ports[named] if isinstance(named, str) else named

    @cached_property
    def environ(self) -> dict[str, str]:
        """`$(NAME)` means a variable stated before; any other stays as it is written."""
        environ: dict[str, str] = {}
        for entry in self.container.get("env", ()):
            environ[entry["name"]] = _expanded(_value(entry), environ)
        return environ

    @property
    def arguments(self) -> list[str]:
        return [_expanded(argument, self.environ) for argument in self.container["args"]]

    @property
    def probes(self) -> dict[str, Object]:
        return {name: probe for name, probe in self.container.items() if name.endswith("Probe")}


@dataclass(frozen=True)
class Manifests:
    """Everything of one kustomization."""

    objects: tuple[Object, ...]

    def of_kind(self, *kinds: str) -> Iterator[Object]:
        return (found for found in self.objects if found["kind"] in kinds)

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        return tuple(map(Workload, self.of_kind("Deployment", "StatefulSet")))

    def workload(self, name: str) -> Workload:
        (found,) = (workload for workload in self.workloads if workload.name == name)
        return found

    def get(self, kind: str, name: str, namespace: str) -> Object:
        (found,) = (
            found
            for found in self.of_kind(kind)
            if (found["metadata"]["name"], found["metadata"]["namespace"]) == (name, namespace)
        )
        return found

    def selected(self, selector: Mapping[str, str], namespace: str) -> tuple[Workload, ...]:
        """Whose pods carry all these labels."""
        return tuple(
            workload
            for workload in self.workloads
            if workload.namespace == namespace and selector.items() <= workload.labels.items()
        )

    def policies_of(self, workload: Workload) -> list[Object]:
        return [
            policy["spec"]
            for policy in self.of_kind("NetworkPolicy")
            if workload in self.selected(policy["spec"]["podSelector"]["matchLabels"], policy["metadata"]["namespace"])
        ]

    def started(self, workload: Workload, folder: Path) -> list[str]:
        """The container's arguments, with what it mounts from ConfigMaps laid out under `folder`."""
        arguments = workload.arguments
        volumes = {volume["name"]: volume for volume in workload.pod["volumes"]}
        for mount in workload.container["volumeMounts"]:
            if "configMap" not in volumes[mount["name"]]:
                continue
            files = self.get("ConfigMap", volumes[mount["name"]]["configMap"]["name"], workload.namespace)["data"]
            place = folder.joinpath(*PurePosixPath(mount["mountPath"]).parts[1:])
            place.mkdir(parents=True)
            for name, text in files.items():
                (place / name).write_text(text, "utf-8")
            arguments = [argument.replace(mount["mountPath"], str(place)) for argument in arguments]
        return arguments


@lru_cache
def rendered(name: str) -> Manifests:
    text = (RENDERED / f"{name}.yaml").read_text("utf-8")
    return Manifests(tuple(found for found in yaml.load_all(text, yaml.CSafeLoader) if found is not None))


def _value(entry: Object) -> str:
    if "value" in entry:
        return str(entry["value"])
    source = entry["valueFrom"]
    if "fieldRef" in source:
        assert source == {"fieldRef": {"fieldPath": "status.podIP"}}
        return POD_IP
    reference = source["secretKeyRef"]
    return SECRETS[reference["name"]][reference["key"]]


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda found: environ.get(found[1], found[0]), text)
