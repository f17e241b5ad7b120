"""Rendered manifests are those of the sources, and every object is one that Kubernetes takes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.unit.deploy.manifests import rendered
from tests.unit.deploy.rendering import DATA, DIGEST, K8S, RENDERED, SOURCES, build, kustomize, sources_digest

SCHEMAS: dict[str, Any] = json.loads((DATA / "schemas" / "v1.27.json").read_text("utf-8"))


def problems(found: dict[str, Any]) -> list[str]:
    kind = SCHEMAS["kinds"].get(found["kind"])
    if kind is None:
        return [f"{found['kind']} is not a kind that is checked"]
    validator = Draft202012Validator({"$defs": SCHEMAS["$defs"], **kind})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(found)]


def test_what_is_kept_is_of_these_sources() -> None:
    assert sources_digest() == DIGEST.read_text("utf-8").strip(), "run: python -m tests.unit.deploy.rendering"


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.skipif(kustomize() is None, reason="no kustomize here: the digest of the sources has to do")
def test_what_is_kept_is_what_kustomize_makes(name: str) -> None:
    command = kustomize()
    assert command is not None
    built = list(yaml.safe_load_all(build(command, SOURCES[name])))
    assert built == list(yaml.safe_load_all((RENDERED / f"{name}.yaml").read_text("utf-8")))


@pytest.mark.parametrize("name", SOURCES)
def test_every_object_fits_the_schema_of_its_kind(name: str) -> None:
    assert {
        found["metadata"]["name"]: found_problems
        for found in rendered(name).objects
        if (found_problems := problems(found))
    } == {}


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "template", "spec", "contaners"),
        ("spec", "template", "spec", "containers", 0, "readinesProbe"),
        ("spec", "template", "spec", "containers", 0, "livenessProbe", "grpc", "prot"),
        ("spec", "template", "spec", "containers", 0, "securityContext", "capabilities", "dropped"),
        ("spec", "minReadySecond"),
    ],
)
def test_the_schemas_know_a_misspelled_name(path: tuple[str | int, ...]) -> None:
    found = copy.deepcopy(rendered("base").workload("kvatlas-indexer").object)
    inner: Any = found
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = "anything"
    assert any(str(path[-1]) in problem for problem in problems(found))


def test_the_schemas_let_nothing_unknown_through() -> None:
    loose = {
        name
        for name, definition in SCHEMAS["$defs"].items()
        if "properties" in definition and definition.get("additionalProperties") is not False
    }
    assert not loose


@pytest.mark.parametrize("name", SOURCES)
def test_no_object_is_there_twice_and_all_but_namespaces_are_in_one(name: str) -> None:
    objects = rendered(name).objects
    names = Counter((found["kind"], found["metadata"]["name"]) for found in objects)
    assert names.most_common(1)[0][1] == 1
    (namespace,) = rendered(name).of_kind("Namespace")
    assert {found["metadata"].get("namespace") for found in objects if found is not namespace} == {
        namespace["metadata"]["name"]
    }


def test_every_file_is_used() -> None:
    """A manifest that no kustomization names is a manifest that is never applied."""
    for path in K8S.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text("utf-8"))
        named = {str(name) for name in kustomization.get("resources", ())}
        named |= {patch["path"] for patch in kustomization.get("patches", ())}
        named |= {file for generator in kustomization.get("configMapGenerator", ()) for file in generator["files"]}
        here = {str(file.relative_to(path.parent)) for file in path.parent.rglob("*") if file.is_file()}
        assert here - named == {"kustomization.yaml"}, path
