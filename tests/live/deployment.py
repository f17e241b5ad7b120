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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.live.processes import Child, answers, free_ports

MODEL = "tiny"
ENGINE_UP_S = 300.0  # two at once on two cores
OURS_UP_S = 60.0
LOOKUP_DEADLINE_MS = 2000  # two engines take both cores of a small machine; here it is what is answered that counts
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
    rest: str
    engines: tuple[str, str]  # ids; the listened one first

    def router_metric(self, name: str, **labels: str) -> float:
        return _sum(f"{self.admin}/metrics", f"kvatlas_router_{name}", labels)

    def indexer_metric(self, name: str, **labels: str) -> float:
        return _sum(f"{self.rest}/metrics", f"kvatlas_indexer_{name}", labels)


def _sum(url: str, name: str, labels: Mapping[str, str]) -> float:
    """Of all series of that name with these labels."""
    with urllib.request.urlopen(url, timeout=10) as response:
        page = response.read().decode()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted))


def make_model(vllm: Path, out: Path, kind: str) -> Path:
    """Raises `AssertionError` with what the script wrote."""
    script, template = HERE / "make_model.py", HERE / "chat_template.jinja"
    command = [str(vllm / "bin" / "python"), str(script), str(TOKENIZER), str(out), kind, str(template)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=plain_environ())
    assert made.returncode == 0, f"no {kind} model:\n{made.stdout}{made.stderr}"
    return out


@contextmanager
def deploy(vllm: Path, model: Path, configuration: Configuration, logs: Path) -> Iterator[Deployment]:
    """Everything up and ready; all of it ended afterwards. Raises `DidNotComeUp`."""
    listened, dialled, listen, events, replay, public, admin, grpc, rest = free_ports(9)
    publishers = {
        listened: {"endpoint": f"tcp://127.0.0.1:{listen}"},
        dialled: {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"},
    }
    with ExitStack() as stack:

        def child(name: str, command: list[str], environ: dict[str, str]) -> Child:
            started = Child(name, command, logs / f"{configuration.name}-{name}.log", environ)
            stack.callback(started.stop)
            return started

        indexer = child(
            "indexer",
            [
                sys.executable, "-m", "kvatlas_indexer",
                "--grpc-listen", f"127.0.0.1:{grpc}", "--rest-listen", f"127.0.0.1:{rest}",
                "--zmq-listen", f"tcp://127.0.0.1:{listen}", "--engine", f"127.0.0.1:{listened}", "--engine",
                f"127.0.0.1:{dialled},events=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{replay}",
                *configuration.told,
            ],
            plain_environ(),
        )  # fmt: skip
        indexer.wait_until(lambda: answers(f"http://127.0.0.1:{rest}/readyz"), OURS_UP_S, "readiness")
        engines = {
            port: child(
                f"engine-{port}",
                serve_command(vllm, model, port, publisher, configuration),
                engine_environ(configuration),
            )
            for port, publisher in publishers.items()
        }
        for port, engine in engines.items():
            engine.wait_until(partial(answers, f"http://127.0.0.1:{port}/health"), ENGINE_UP_S, "answer from /health")
        router = child(
            "router",
            [
                sys.executable, "-m", "kvatlas_router", "--indexer", f"127.0.0.1:{grpc}",
                "--host", "127.0.0.1", "--port", str(public), "--admin-port", str(admin), "--drain-delay-s", "0",
                "--lookup-deadline-ms", str(LOOKUP_DEADLINE_MS),
            ],
            plain_environ(),
        )  # fmt: skip
        deployment = Deployment(
            router=f"http://127.0.0.1:{public}",
            admin=f"http://127.0.0.1:{admin}",
            rest=f"http://127.0.0.1:{rest}",
            engines=(f"127.0.0.1:{listened}", f"127.0.0.1:{dialled}"),
        )
        router.wait_until(lambda: answers(f"{deployment.router}/readyz"), OURS_UP_S, "readiness")
        router.wait_until(
            lambda: deployment.router_metric("engines", health="ready") == len(engines), OURS_UP_S, "ready engines"
        )
        # Until then engines are asked for tokens: right as well, but not what is looked at here.
        router.wait_until(lambda: "tokenizer loaded" in router.log.read_text(errors="replace"), OURS_UP_S, "tokenizer")
        yield deployment


def serve_command(
    vllm: Path, model: Path, port: int, publisher: dict[str, str], configuration: Configuration
) -> list[str]:
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


def engine_environ(configuration: Configuration) -> dict[str, str]:
    environ = {
        **plain_environ(),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environ.pop("PYTHONHASHSEED", None)
    return environ | configuration.environ


def plain_environ() -> dict[str, str]:
    """The environment without settings of ours, and without a hub."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KVATLAS_")} | {"HF_HUB_OFFLINE": "1"}
