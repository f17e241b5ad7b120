"""`python -m kvatlas_loadtest.bench`: what is measured, what a row says, and that a failure costs its own rows only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvatlas_loadtest.bench.__main__ import main
from kvatlas_loadtest.bench.beside import Lookups, compared
from kvatlas_loadtest.bench.dynamo import Question
from kvatlas_loadtest.bench.feeds import Prompt
from kvatlas_loadtest.bench.ingest import Ingest
from kvatlas_loadtest.bench.lookups import WARM_UP
from kvatlas_loadtest.bench.measurements import MEASUREMENTS, Measurement, chosen
from kvatlas_loadtest.bench.rows import Options, at_least, at_most

BUDGETS = [
    "match_memory_ms",
    "grpc_match_memory_p50_ms",
    "grpc_match_redis_p50_ms",
    "ingest_memory_blocks_per_s",
    "ingest_redis_blocks_per_s",
    "bytes_per_holder_memory",
    "bytes_per_holder_redis",
    "match_redis_wide_ms",
    "visible_memory_p99_ms",
    "visible_redis_p99_ms",
    "hash_ms",
    "router_added_p50_ms",
    "router_added_p99_ms",
    "router_cpu_ms_per_request",
    "idle_cores_100_engines",
    "choose_100_engines_ms",
]


def test_every_budget_has_its_row() -> None:
    assert sorted(row for m in MEASUREMENTS for row in m.rows) == sorted(BUDGETS)


def test_beside_dynamo_there_are_rows_with_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"ingest_memory_of_dynamo", "grpc_match_memory_of_dynamo", "grpc_match_tokens_of_dynamo"}
    monkeypatch.delenv("KVATLAS_BENCH_DYNAMO", raising=False)
    assert not names & {row for m in MEASUREMENTS for row in m.owed}
    monkeypatch.setenv("KVATLAS_BENCH_DYNAMO", "/some/python")
    assert names < {row for m in MEASUREMENTS for row in m.owed}
    assert [m.name for m in chosen(["grpc_match_tokens_of_dynamo"])] == ["grpc_memory"]


def test_dynamo_is_compared_in_times() -> None:
    ours, theirs = (Lookups(n, _never, 1, (), [s] * (WARM_UP + 3), spent=s) for n, s in (("ours", 0.5), ("its", 1.25)))
    latency, cpu = compared("x", ours, theirs)
    assert (latency["name"], latency["value"], latency["budget"], latency["within"]) == ("x_of_dynamo", 2.5, 2.0, True)
    assert (cpu["name"], cpu["value"], cpu["budget"]) == ("x_of_dynamo_cpu", 2.5, None)


def test_dynamo_is_asked_for_a_prompt_in_its_two_ways() -> None:
    prompt = Prompt(np.random.default_rng(0), 2, 16)
    for question, field, count in ((Question.by_hash, "block_hashes", 2), (Question.by_tokens, "token_ids", 32)):
        head, _, body = question(prompt).data.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        assert len(json.loads(body)[field]) == count


async def _never(number: int) -> tuple[dict[str, int], float]:
    raise AssertionError(number)


def test_measurements_are_chosen_by_their_name_or_by_a_row() -> None:
    assert [m.name for m in chosen(["hash_ms", "wide"])] == ["wide", "hash"]
    assert len(chosen([])) == len(MEASUREMENTS)
    with pytest.raises(ValueError, match="nothing is called hash_s; there is match, match_memory_ms"):
        chosen(["hash_s"])


def test_a_budget_is_met_at_its_very_figure() -> None:
    assert [at_most("a", 1.0, "ms", 1.0)["within"], at_least("a", 0.9, "times", 1.0)["within"]] == [True, False]


async def test_what_cannot_be_measured_says_so_in_its_rows(tmp_path: Path) -> None:
    (row,) = await Measurement("x", "nowhere:rows", ("x_ms",)).run(Options(tmp_path))
    assert (row["value"], row["within"]) == (None, None)
    assert "ModuleNotFoundError" in row["error"]


@pytest.mark.parametrize(
    ("indexer_s", "server_s", "busy", "limit"),
    [
        (1.0, 1.9, 0.9, "Valkey's thread"),
        (1.8, 0.5, 0.9, "the indexers' loops"),
        (1.0, 1.0, 0.9, "the machine's cores"),
        (1.0, 1.0, 0.6, "their waiting for each other"),
    ],
)
def test_what_limits_is_what_was_used_up(indexer_s: float, server_s: float, busy: float, limit: str) -> None:
    assert Ingest(1000, 1, 2.0, indexer_s, server_s, busy).limit == limit


def test_the_rows_are_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "build" / "bench.json"
    assert main(["--quick", "--only", "hash", "--json", str(written)]) == 0
    (row,) = json.loads(written.read_text())
    assert (row["name"], row["budget"], row["within"]) == ("hash_ms", 3.0, row["value"] <= 3.0)
    assert "hash_ms" in capsys.readouterr().out
