"""The image's steps, by hand: a wheel from the repository's root, into an empty environment, and `kvatlas` from there.

Dependencies are those of the environment that runs the tests, not downloaded again; the project itself is the wheel's,
because a plain path in a `.pth` file does not bring in the editable install beside them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from tests.unit.deploy.rendering import ROOT

HEALTH_CHECK = ROOT / "deploy" / "docker" / "healthcheck.py"
DEADLINE_S = 60.0
ANY_PORTS = [
    *("--host", "127.0.0.1", "--port", "0", "--admin-port", "0"),
    *("--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0", "--zmq-listen", "tcp://127.0.0.1:0"),
]
open_url = build_opener(ProxyHandler({})).open


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True)
    return folder


def environ(environment: Path) -> dict[str, str]:
    return {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HOME": str(environment)}


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Stubs, templates, the web page and the simulated model included."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = [ROOT / package for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    files = [
        path.relative_to(package.parent).as_posix()
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sorted(names) == sorted(files)
    assert {"kvatlas_indexer/adapters/page.html", "kvatlas_common/proto/kvatlas/v1/index_pb2.py"} <= set(names)


def test_the_command_is_the_wheels_own(environment: Path) -> None:
    where = (
        "import kvatlas_cli, kvatlas_indexer, sys; print(kvatlas_cli.__file__, kvatlas_indexer.__file__, sys.prefix)"
    )
    python = [str(environment / "bin" / "python"), "-c", where]
    run = subprocess.run(python, env=environ(environment), cwd=environment, capture_output=True, text=True, check=True)
    assert all(found.startswith(str(environment)) for found in run.stdout.split())
    helped = subprocess.run(
        ["kvatlas", "-h"], env=environ(environment), cwd=environment, capture_output=True, text=True, check=True
    )
    assert "indexer" in helped.stdout


def test_up_serves_from_the_wheel_and_the_health_check_sees_it(environment: Path) -> None:
    with running_up(environment) as said:
        router, index = said["router"], said["index"]
        page = fetch(index)
        assert "<html" in page
        body = json.dumps({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]})
        answer = json.loads(fetch(f"{router}/v1/chat/completions", body.encode()))
        assert answer["usage"]["completion_tokens"] == 4
        assert health_check(environment, address(router)) == 0
        assert health_check(environment, "127.0.0.1:9", address(index)) == 0
    assert health_check(environment, address(router), address(index)) == 1


@contextmanager
def running_up(environment: Path) -> Iterator[dict[str, str]]:
    """`kvatlas up` with one simulated engine; its URLs, as it prints them. It must end with status 0 when asked."""
    log = environment / "up.log"
    with log.open("wb") as stderr:
        up = subprocess.Popen(
            ["kvatlas", "up", "--simulate", "1", *ANY_PORTS], env=environ(environment), cwd=environment, stderr=stderr
        )
    try:
        said: dict[str, str] = {}
        deadline = time.monotonic() + DEADLINE_S
        while not ({"router", "index"} <= said.keys() and ready(said["router"])):
            assert up.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < deadline, log.read_text("utf-8")
            said = dict(re.findall(r"^(router|index) +(http://\S+?)/?(?: |$)", log.read_text("utf-8"), re.MULTILINE))
            time.sleep(0.05)
        yield said
        up.send_signal(signal.SIGTERM)
        assert up.wait(DEADLINE_S) == 0
    finally:
        up.kill()
        up.wait()


def ready(url: str) -> bool:
    try:
        fetch(f"{url}/readyz")
    except (HTTPError, URLError):
        return False
    return True


def fetch(url: str, body: bytes | None = None) -> str:
    with open_url(Request(url, data=body), timeout=DEADLINE_S) as answer:
        text: bytes = answer.read()
    return text.decode()


def address(url: str) -> str:
    return url.removeprefix("http://")


def health_check(environment: Path, *addresses: str) -> int:
    python = str(environment / "bin" / "python")
    return subprocess.run([python, "-I", str(HEALTH_CHECK), *addresses], check=False).returncode
