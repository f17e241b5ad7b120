"""Cuts v1.27.json out of the JSON schemas that the PyPI package kubernetes-validate ships (Apache-2.0).

    pip download --no-deps kubernetes-validate==1.37.0 && unzip -d . kubernetes_validate-*.whl
    python make.py kubernetes_validate/kubernetes-json-schema/v1.27.0-local-strict > v1.27.json

Strict: a property that the API does not know is an error. So is one of those cut away here: descriptions, what only the
API server writes, and kinds of volumes that no manifest of ours has.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "Service": "io.k8s.api.core.v1.Service",
    "ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
    "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
}
VOLUMES = {"name", "configMap", "emptyDir", "persistentVolumeClaim", "secret"}
KEPT = {
    "io.k8s.api.core.v1.Volume": VOLUMES,
    "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta": {"annotations", "labels", "name", "namespace"},
}
CUT = {
    "io.k8s.api.apps.v1.StatefulSetSpec": {"volumeClaimTemplates"},
    "io.k8s.api.core.v1.PodSpec": {"ephemeralContainers", "resourceClaims"},
}
REFERENCE = re.compile(r"[^#]*#/\$defs/(?P<name>.+)")


def trimmed(definition: dict[str, Any], name: str) -> dict[str, Any]:
    properties = definition.get("properties", {})
    cut = CUT.get(name, set()) | ({"status"} if name in KINDS.values() else set())
    kept = {key: value for key, value in properties.items() if key in KEPT.get(name, properties) and key not in cut}
    return definition | ({"properties": kept} if properties else {})


def bare(node: Any, wanted: list[str]) -> Any:
    """Without descriptions; references point inside the one document, and are noted in `wanted`."""
    if isinstance(node, list):
        return [bare(item, wanted) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        found = REFERENCE.fullmatch(node["$ref"])
        assert found is not None, node
        wanted.append(found["name"])
        return {"$ref": f"#/$defs/{found['name']}"}
    return {
        key: {name: bare(inner, wanted) for name, inner in value.items()}
        if key == "properties"
        else bare(value, wanted)
        for key, value in node.items()
        if key == "properties" or not (key == "description" or key.startswith("x-kubernetes"))
    }


def main(folder: Path) -> None:
    source = json.loads((folder / "_definitions.json").read_text("utf-8"))["$defs"]
    definitions: dict[str, Any] = {}
    wanted = list(KINDS.values())
    while wanted:
        name = wanted.pop()
        if name not in definitions:
            definitions[name] = bare(trimmed(source[name], name), wanted)
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "kinds": {kind: {"$ref": f"#/$defs/{name}"} for kind, name in KINDS.items()},
        "$defs": dict(sorted(definitions.items())),
    }
    json.dump(document, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
