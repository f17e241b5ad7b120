"""The doctor before a real vLLM that was started with another seed, algorithm and chat template than is configured.

One engine, started twice: as it should not be, and then as it should be, on the same ports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.live.deployment import (
    ENGINE_UP_S,
    MODEL,
    OURS_UP_S,
    Configuration,
    engine_environ,
    make_model,
    plain_environ,
    serve_command,
)
from tests.live.processes import Child, answers, free_ports

VLLM = os.environ.get("KVATLAS_VLLM", "")
FOUND_S = 60.0

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM, reason="KVATLAS_VLLM is not set: name a virtual environment with vLLM in it"),
]

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
RIGHT = Configuration(
    "right", "full", ("--block-size", "32", "--prefix-caching-hash-algo", "sha256_cbor"), {"PYTHONHASHSEED": "42"}
)
TOLD = ("--block-size", "32", "--prefix-caching-hash-algo", "sha256_cbor", "--hash-seed", "42")


@dataclass(frozen=True, slots=True)
class Services:
    """Base URLs; `engine`: its address, `spec`: with its ports."""

    rest: str
    admin: str
    engine: str
    spec: str

    def doctor(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Exit status, and what it has found, by code."""
        command = [sys.executable, "-m", "kvatlas_cli", "doctor", "--indexer", self.rest, "--admin", self.admin]
        command += ["--engine", self.spec, "--timeout-s", "30", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain_environ(), timeout=300)
        return done.returncode, {found["code"]: found for found in json.loads(done.stdout)["findings"]}

    def metric(self, base: str, name: str) -> float:
        with urllib.request.urlopen(f"{base}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def ask(self) -> None:
        """A prompt of several blocks, straight to the engine."""
        body = {"model": MODEL, "prompt": f"{time.time()} and so on " * 60, "max_tokens": 2}
        request = urllib.request.Request(
            f"http://{self.engine}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200


@contextmanager
def served(vllm: Path, model: Path, logs: Path, configuration: Configuration, ports: list[int]) -> Iterator[None]:
    port, events, replay = ports
    publisher = {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"}
    command = serve_command(vllm, model, port, publisher, configuration)
    child = Child("engine", command, logs / f"{configuration.name}.log", engine_environ(configuration))
    try:
        child.wait_until(partial(answers, f"http://127.0.0.1:{port}/health"), ENGINE_UP_S, "answer from /health")
        yield
    finally:
        child.stop()


@contextmanager
def services(model: Path, logs: Path, ports: list[int]) -> Iterator[Services]:
    port, events, replay = ports
    public, admin, grpc, rest, listen = free_ports(5)
    spec = f"127.0.0.1:{port},events={events},replay={replay}"
    with ExitStack() as stack:
        command = [
            sys.executable, "-m", "kvatlas_cli", "up", "--host", "127.0.0.1", "--port", str(public),
            "--admin-port", str(admin), "--grpc-listen", f"127.0.0.1:{grpc}", "--rest-listen", f"127.0.0.1:{rest}",
            "--zmq-listen", f"tcp://127.0.0.1:{listen}", "--engine", spec, "--model-files", f"{MODEL}={model}",
            "--parity-interval-s", "5", *TOLD,
        ]  # fmt: skip
        up = Child("up", command, logs / "up.log", plain_environ())
        stack.callback(up.stop)
        up.wait_until(partial(answers, f"http://127.0.0.1:{rest}/readyz"), OURS_UP_S, "readiness")
        yield Services(f"http://127.0.0.1:{rest}", f"http://127.0.0.1:{admin}", f"127.0.0.1:{port}", spec)


def until(look: Callable[[], bool], what: Callable[[], object]) -> None:
    ends_at = time.monotonic() + FOUND_S
    while not look():
        assert time.monotonic() < ends_at, what()
        time.sleep(0.5)


def test_a_real_engine_started_otherwise_is_named_and_cleared_when_started_as_configured(tmp_path: Path) -> None:
    vllm, ports = Path(VLLM), free_ports(3)
    model = make_model(vllm, tmp_path / "model", "full")
    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE)
    wrong = Configuration(
        "wrong", "full", ("--block-size", "32", "--chat-template", str(template)), {"PYTHONHASHSEED": "7"}
    )
    with services(model, tmp_path, ports) as one:
        with served(vllm, model, tmp_path, wrong, ports):
            one.ask()
            wanted = {"seed-differs", "algorithm-differs", "template-differs"}
            until(lambda: wanted <= one.doctor()[1].keys(), one.doctor)
            status, found = one.doctor()
            for code in found:
                print(f"{code}: {found[code]['wrong']}\n  cause: {found[code]['cause']}\n  do: {found[code]['change']}")
            assert status == 1
            assert found.keys() == wanted
            assert {found[code]["about"] for code in wanted} == {one.engine}
            assert "PYTHONHASHSEED=42" in found["seed-differs"]["change"]
            assert "--prefix-caching-hash-algo sha256_cbor" in found["algorithm-differs"]["change"]
            assert "--chat-template" in found["template-differs"]["change"]
            for code in ("seed-differs", "algorithm-differs"):
                assert one.metric(one.rest, f'kvatlas_indexer_findings{{code="{code}"}}') == 1
            assert one.metric(one.admin, 'kvatlas_router_findings{code="template-differs"}') == 1
        until(lambda: "engine-down" in one.doctor()[1], one.doctor)
        with served(vllm, model, tmp_path, RIGHT, ports):
            one.ask()
            until(lambda: one.doctor() == (0, {}), one.doctor)
