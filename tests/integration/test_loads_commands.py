"""`python -m kvatlas_loadtest.loads` as a user runs it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.loads.__main__ import main
from kvatlas_loadtest.loads.document import load
from kvatlas_loadtest.loads.outcomes import from_json
from kvatlas_loadtest.loads.workloads import workload
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.engine_kit import simulated_engine

DEADLINE_S = 120.0


async def started(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvatlas_loadtest.loads", *arguments, stdout=-1, stderr=-1
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    try:
        async with asyncio.timeout(DEADLINE_S):
            out, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), said.decode()


async def test_policies_compared_in_several_processes(tmp_path: Path) -> None:
    arguments = ["--workload", "agents@0.01,all-unique", "--scale", "0.02", "--policy", "precise,least-load"]
    files = [f"--{name}={tmp_path / name}" for name in ("rows", "json", "runs")]
    process = await started("simulate", *arguments, "--seeds=1,2", "--processes=2", "--quiet", *files)
    status, out, said = await ended(process)
    assert (status, said) == (0, "")
    assert "8 of 8 runs" in out
    document = load(tmp_path / "json")
    assert document.simulated
    assert document.facts["scales"] == "agents 0.01, all-unique 0.02"
    order = [(f.workload, f.policy, f.seed) for f in document.figures]
    assert order[:3] == [("agents", "precise", 1), ("agents", "precise", 2), ("agents", "least-load", 1)]
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows").read_text())}
    assert rows["all_unique_ttft_p90_s_of_least_load"]["peer"] == "least-load, s"
    whole = from_json((tmp_path / "runs" / "agents-precise-1.json").read_bytes())
    assert len(whole.outcomes) == document.figures[0].requests


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workload", "agents@2"), "scale 2 of agents"),
        (("--workload", "nobody"), "nobody"),
        (("--policy", "nobody"), "nobody"),
        (("--crash", "9@1-2"), "there are engines 0 to 7"),
    ],
)
def test_what_cannot_be_simulated_is_named_first(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, written = main(["simulate", *arguments]), capsys.readouterr()
    assert (status, written.out) == (2, "")
    assert said in written.err
    assert "Traceback" not in written.err


def target(engine: SimulatedEngine) -> list[str]:
    return ["run", "--url", engine.url, "--model", "tiny", "--workload", "hot-prefix", "--tokens", "0.05"]


async def test_a_load_on_a_server(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    async with simulated_engine(EngineConfig(time_model=NO_TIME, events_endpoint=None)) as engine:
        options = ["--scale=0.01", "--slower=0.2", "--header", "authorization: secret", f"--json={file}"]
        status, out, _ = await ended(await started(*target(engine), *options))
    requests = len(workload("hot-prefix", seed=1, scale=0.01))
    document = load(file)
    (found,) = document.figures
    assert (status, found.errors, found.requests) == (0, {}, requests)
    assert f"{requests} of {requests} requests" in out
    assert found.cached_share > 0.3
    assert not document.simulated
    assert "secret" not in file.read_text()


async def test_a_load_that_is_interrupted_reports_what_it_has() -> None:
    async with simulated_engine(EngineConfig(time_model=NO_TIME, events_endpoint=None)) as engine:
        process = await started(*target(engine), "--slower=10", "--completions")
        async with asyncio.timeout(DEADLINE_S):
            while not engine.block_table():
                assert process.returncode is None
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        status, out, _ = await ended(process)
    assert status == 0
    assert "broken off" in out
