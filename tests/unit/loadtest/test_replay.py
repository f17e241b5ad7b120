"""The simulated engine is equal to the real ones, event by event, on recorded traffic."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from kvatlas_loadtest.commands import main

DATA = Path(__file__).parents[2] / "data"
V010 = "replay/v010-sha256cbor64-b64 --num-blocks 400 --block-size 64 --hash-seed 42 --pool 0.10 --resets 40"
EQUAL = {
    V010: "sha256_cbor_64bit",
    "replay/v032-evict-b32 --num-blocks 140 --block-size 32 --hash-seed 42 --pool 0.32 --resets 40,80": "sha256_cbor",
    "replay/v032-sha256cbor-b64 --num-blocks 16384 --block-size 64 --hash-seed 42 --pool 0.32": "sha256_cbor",
    "replay/v032-default-b32 --num-blocks 32768 --block-size 32 --pool 0.32": "sha256",
    "replay/v032-salt-b32 --num-blocks 32768 --block-size 32 --hash-seed 7 --pool 0.32": "sha256_cbor",
    "captures/v032-bytes-b32 --num-blocks 150 --block-size 32 --pool 0.32 --resets 29": "sha256",
    "captures/v032-sha256-seed-b128 --num-blocks 40 --block-size 128 --hash-seed 12345 --resets 24": "sha256",
}
SALT = "--num-blocks 32768 --block-size 32 --hash-seed 7 --prefix-caching-hash-algo sha256_cbor"
SMALL = "--num-blocks 9 --block-size 4 --prefix-caching-hash-algo sha256"


def replayed(options: str, algorithm: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, int]]:
    name, *rest = options.split()
    status = main(["replay", str(DATA / name), *rest, "--prefix-caching-hash-algo", algorithm, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("options", "algorithm"), EQUAL.items())
def test_a_real_engines_events_are_reproduced(options: str, algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = replayed(options, algorithm, capsys)
    assert list(report) == ["events_real", "events_simulated", "differences", "cached_mismatches"]
    assert (status, report["differences"], report["cached_mismatches"]) == (0, 0, 0)
    assert report["events_real"] == report["events_simulated"] > 30


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("--num-blocks 400", "--num-blocks 399"),
        ("--hash-seed 42", "--hash-seed 43"),
        ("--pool 0.10", "--pool 0.32"),
        ("--resets 40", "--resets 39"),
    ],
)
def test_a_wrong_option_shows(right: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = replayed(V010.replace(right, wrong), "sha256_cbor_64bit", capsys)
    assert status == 1
    assert report["differences"] > 0


def test_a_wrong_cached_count_alone_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DATA / "replay/v032-salt-b32", tmp_path, dirs_exist_ok=True)
    packed = tmp_path / "requests.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).splitlines()
    packed.unlink()
    first = json.loads(lines[0])
    first["cached_tokens"] += 32
    (tmp_path / "requests.jsonl").write_bytes(b"\n".join([json.dumps(first).encode(), *lines[1:]]))
    assert main(["replay", str(tmp_path), *SALT.split()]) == 1
    assert "differences: 0; cached-token mismatches: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("nowhere --num-blocks 9 --block-size 32 --prefix-caching-hash-algo sha256", "nowhere"),
        ("replay/v032-salt-b32 --num-blocks 9 --block-size 32 --prefix-caching-hash-algo xxhash", "random seed"),
        (
            "replay/v032-salt-b32 --num-blocks 9 --block-size 32 --prefix-caching-hash-algo sha256",
            "together, are possible",
        ),
        (
            "replay/v032-salt-b32 --num-blocks 1 --block-size 32 --prefix-caching-hash-algo sha256",
            "block 0 is reserved",
        ),
    ],
)
def test_what_cannot_be_replayed_is_explained(options: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = options.split()
    assert main(["replay", str(DATA / name), *rest]) == 2
    assert why in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text('{"frames": ["AA==", "AA==", "wQ=="]}\n')
    (tmp_path / "requests.jsonl").write_text('{"prompt_token_ids": "?"}\n')
    options = ["replay", str(tmp_path), *SMALL.split()]
    assert main(options) == 2
    assert "requests.jsonl:1" in capsys.readouterr().err
    (tmp_path / "requests.jsonl").write_text("")
    assert main(options) == 2
    assert "event message 0" in capsys.readouterr().err
