"""What the acceptance runs on: two real vLLM engines on CPU, an indexer and a router, all as processes on loopback.

One engine's publisher connects to us (listened; named by its topic, no replay, as in the reference set-up), the other's
binds (dialled; with a replay endpoint). Ports are free ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.live.processes import Child, answers, free_ports

MODEL = "tiny"
ENGINE_UP_S = 300.0  # two at once on two cores
OURS_UP_S = 60.0
HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "data" / "models" / "tiny"


@dataclass(frozen=True, slots=True)
class Configuration:
    """How the engines are started, and what the indexer is told of it (where nothing, it finds out)."""

    name: str
    model: str  # full or hybrid
    flags: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deployment:
    router: str  # base URLs
    admin: str
    engines: tuple[str, str]  # ids; the listened one first
    children: tuple[Child, ...]

    def logs(self) -> str:
        return "\n".join(f"--- {child.name}\n{child.tail()}" for child in self.children)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a router's counter over all its series with these labels."""
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=10) as response:
            page = response.read().decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in page.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted))


def make_model(vllm: Path, out: Path, kind: str) -> Path:
    """Raises `AssertionError` with what the script wrote."""
    script, template = HERE / "make_model.py", HERE / "chat_template.jinja"
    command = [str(vllm / "bin" / "python"), str(script), str(TOKENIZER), str(out), kind, str(template)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=_plain())
    assert made.returncode == 0, f"no {kind} model:\n{made.stdout}{made.stderr}"
    return out


@contextmanager
def deploy(vllm: Path, model: Path, configuration: Configuration, logs: Path) -> Iterator[Deployment]:
    """Everything up and ready; all of it ended afterwards. Raises `DidNotComeUp`."""
    listened, dialled, listen, events, replay, public, admin, grpc, rest = free_ports(9)
    publishers = [
        {"endpoint": f"tcp://127.0.0.1:{listen}"},
        {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"},
    ]
    specs = [
        f"127.0.0.1:{listened}",
        f"127.0.0.1:{dialled},events=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{replay}",
    ]
    with ExitStack() as stack:

        def child(name: str, command: list[str], environ: dict[str, str]) -> Child:
            started = Child(name, command, logs / f"{configuration.name}-{name}.log", environ)
            stack.callback(started.stop)
            return started

        engines = [
            child(f"engine-{port}", _serve(vllm, model, port, publisher, configuration), _engine_env(configuration))
            for port, publisher in zip((listened, dialled), publishers, strict=True)
        ]
        indexer = child(
            "indexer",
            [
                *_ours("indexer"), "--grpc-listen", f"127.0.0.1:{grpc}", "--rest-listen", f"127.0.0.1:{rest}",
                "--zmq-listen", f"tcp://127.0.0.1:{listen}",
                *(word for spec in specs for word in ("--engine", spec)), *configuration.told,
            ],
            _plain(),
        )  # fmt: skip
        router = child(
            "router",
            [
                *_ours("router"), "--indexer", f"127.0.0.1:{grpc}", "--host", "127.0.0.1", "--port", str(public),
                "--admin-port", str(admin), "--drain-delay-s", "0",
            ],
            _plain(),
        )  # fmt: skip
        indexer.wait_until(lambda: answers(f"http://127.0.0.1:{rest}/readyz"), OURS_UP_S, "readiness")
        for engine, port in zip(engines, (listened, dialled), strict=True):
            url = f"http://127.0.0.1:{port}/health"
            engine.wait_until(lambda url=url: answers(url), ENGINE_UP_S, "answer from /health")  # type: ignore[misc]
        deployment = Deployment(
            router=f"http://127.0.0.1:{public}",
            admin=f"http://127.0.0.1:{admin}",
            engines=(f"127.0.0.1:{listened}", f"127.0.0.1:{dialled}"),
            children=(*engines, indexer, router),
        )
        router.wait_until(lambda: answers(f"{deployment.router}/readyz"), OURS_UP_S, "readiness")
        router.wait_until(lambda: _ready_engines(deployment) == 2, OURS_UP_S, "two ready engines")
        yield deployment


def _ours(service: str) -> list[str]:
    return [sys.executable, "-m", f"kvatlas_{service}"]


def _ready_engines(deployment: Deployment) -> float:
    return deployment.metric("kvatlas_router_engines", health="ready")


def _serve(vllm: Path, model: Path, port: int, publisher: dict[str, str], configuration: Configuration) -> list[str]:
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "topic": f"kv@127.0.0.1:{port}@{MODEL}",
        **publisher,
    }
    return [
        str(vllm / "bin" / "vllm"), "serve", str(model), "--served-model-name", MODEL,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096", "--enforce-eager", "--dtype", "float32",
        "--enable-prompt-tokens-details", "--kv-events-config", json.dumps(events), *configuration.flags,
    ]  # fmt: skip


def _engine_env(configuration: Configuration) -> dict[str, str]:
    environ = {
        **_plain(),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environ.pop("PYTHONHASHSEED", None)
    return environ | configuration.environ


def _plain() -> dict[str, str]:
    """The environment without settings of ours, and without a hub."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KVATLAS_")} | {"HF_HUB_OFFLINE": "1"}
