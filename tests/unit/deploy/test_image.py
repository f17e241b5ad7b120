"""The Dockerfile, read as a linter would: there is no daemon here to build it. Its steps, done by hand, are in
tests/integration/test_deploy_wheel.py."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from kvatlas_common.settings import load
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_router.settings import RouterSettings
from tests.unit.deploy.manifests import rendered
from tests.unit.deploy.rendering import ROOT

DOCKER = ROOT / "deploy" / "docker"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


class Instruction(NamedTuple):
    word: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (DOCKER / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages() -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions():
        if instruction.word == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def said(stage: list[Instruction], word: str) -> list[str]:
    return [text for found, text in stage if found == word]


def pins(name: str) -> dict[str, Version]:
    lines = (DOCKER / name).read_text("utf-8").split()
    return {package: Version(version) for package, _, version in (line.partition("==") for line in lines)}


def test_both_stages_stand_on_one_base_of_a_stated_version() -> None:
    (base,) = (text for word, text in instructions() if word == "ARG")
    name, _, image = base.partition("=")
    assert [stage[0].text for stage in stages()] == [f"${{{name}}} AS build", f"${{{name}}}"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)


def test_the_image_holds_what_was_built_and_not_what_built_it() -> None:
    build, final = stages()
    assert said(final, "COPY") == ["--from=build /opt/kvatlas /opt/kvatlas"]
    assert not any("pip" in text for text in said(final, "RUN"))
    assert any("--without-pip" in text for text in said(build, "RUN"))
    assert not any(word == "ADD" for word, _ in instructions())


def test_it_runs_as_the_nobody_that_the_pods_run_as() -> None:
    final = stages()[-1]
    (user,) = said(final, "USER")
    security = rendered("base").workload("kvatlas-router").pod["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    last_run = max(number for number, found in enumerate(final) if found.word == "RUN")
    assert last_run < final.index(Instruction("USER", user)), "what is made belongs to root"


def test_it_starts_the_command_and_says_what_there_is() -> None:
    final = stages()[-1]
    assert [json.loads(text) for text in said(final, "ENTRYPOINT")] == [["kvatlas"]]
    assert [json.loads(text) for text in said(final, "CMD")] == [["-h"]]
    assert "kvatlas" in PYPROJECT["project"]["scripts"]


def test_it_asks_a_service_for_its_health() -> None:
    build, final = stages()
    (check,) = said(final, "HEALTHCHECK")
    options, _, command = check.partition("CMD ")
    assert {"--interval", "--timeout", "--start-period"} <= {option.partition("=")[0] for option in options.split()}
    python, _, script = json.loads(command)
    assert python.startswith("/opt/kvatlas/bin/")
    assert f"deploy/docker/healthcheck.py {script.rpartition('/')[0]}/" in said(build, "COPY")


def test_its_ports_are_the_defaults() -> None:
    (exposed,) = said(stages()[-1], "EXPOSE")
    router, indexer = load(RouterSettings, [], {}, prog="kvatlas router"), IndexerSettings.load([], {})
    listened = [*indexer.zmq_listen, indexer.grpc_listen, indexer.rest_listen]
    ports = [router.port, router.admin_port, *(int(address.rpartition(":")[2]) for address in listened)]
    assert sorted(map(int, exposed.split())) == sorted(ports)


def test_what_is_copied_is_there_and_let_through() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_through = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {source for text in said(stages()[0], "COPY") for source in shlex.split(text)[:-1]}
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]]
    assert all(any(f"{source}/".startswith(f"{done}/") for done in copied) for source in [*packages, *files])


def test_the_pins_satisfy_what_the_project_asks_for() -> None:
    for name, wanted in (
        ("requirements.txt", PYPROJECT["project"]["dependencies"]),
        ("build-requirements.txt", PYPROJECT["build-system"]["requires"]),
    ):
        pinned = pins(name)
        unmet = [
            str(requirement)
            for requirement in map(Requirement, wanted)
            if requirement.name.lower() not in pinned or pinned[requirement.name.lower()] not in requirement.specifier
        ]
        assert not unmet, f"{name}: run deploy/docker/pin.sh"
