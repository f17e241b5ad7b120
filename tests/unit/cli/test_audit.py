"""The audit, on every capture of a real engine: the index says what the engine did, request by request."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas_cli import __main__ as command
from kvatlas_cli import audit, capture
from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, HashProfile
from kvatlas_indexer.core.naming import Expected
from tests.unit.indexer.core.published import SIZE, Publisher, profile

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
A = Algorithm


@dataclass(frozen=True)
class Known:
    """What an audit of a capture must find.

    `seed` None: it is random, no configuration can name it. `hidden`: mismatches that remain when keys are recomputed,
    because the events do not tell which requests were salted.
    """

    algorithm: Algorithm
    seed: str | None
    block_size: int
    explained: int = 0
    hidden: int = 0
    mismatches: int = 0
    reannounces: bool = False

    def given(self) -> Expected:
        return Expected(self.algorithm, self.seed, self.block_size)


KNOWN = {
    "v010-sha256cbor64-b64": Known(A.SHA256_CBOR_64BIT, "42", 64, hidden=3),
    "v0110-core-bytes-b16": Known(A.SHA256, "42", 16),
    "v0120-core-b32": Known(A.SHA256_CBOR, "42", 32),
    "v0160-core-b32": Known(A.SHA256_CBOR, "42", 32),
    "v0221-core-random-b32": Known(A.SHA256, None, 32),
    "v032-bytes-b32": Known(A.SHA256, FIXED_SEED, 32, explained=1),
    "v032-concurrent-b32": Known(A.SHA256_CBOR, "42", 32),
    "v032-dp2-b32": Known(A.SHA256_CBOR, "42", 32),
    "v032-hybrid-evict-b32": Known(A.SHA256_CBOR, "42", 32),
    "v032-hybrid-w160-b64": Known(A.SHA256_CBOR, "3", 64),
    "v032-lora-b32": Known(A.SHA256_CBOR, "42", 32),
    # with a CPU tier, a prompt of whole blocks counts its last one too: one request is like that
    "v032-offload-noop-b32": Known(A.SHA256_CBOR, "42", 32, mismatches=1),
    "v032-reportfull-b32": Known(A.SHA256_CBOR, "42", 32, reannounces=True),
    "v032-salt-b32": Known(A.SHA256_CBOR, "7", 32),
    "v032-sha256-seed-b128": Known(A.SHA256, "12345", 128, explained=1),
    "v032-xxhcbor-random-b32": Known(A.XXHASH_CBOR, None, 32, explained=1),
}


@cache
def load(name: str) -> capture.Capture:
    return capture.load(CAPTURES / name)


def run(name: str, expected: Expected, *, may_reproduce: bool = True) -> audit.Report:
    return audit.audit(load(name), expected, may_reproduce=may_reproduce, reannounces=KNOWN[name].reannounces)


def test_every_capture_is_audited() -> None:
    assert sorted(KNOWN) == sorted(path.name for path in CAPTURES.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "discovered") for name in KNOWN] + [(name, "given") for name, known in KNOWN.items() if known.seed],
)
def test_predicted_is_actual(name: str, how: str) -> None:
    known = KNOWN[name]
    report = run(name, known.given() if how == "given" else Expected())
    assert (report.mismatches, report.explained) == (known.mismatches, known.explained), report.first_mismatches
    assert report.requests >= 12
    assert report.actual_tokens > 0
    if report.explained == 0 and known.mismatches == 0:
        assert report.predicted_tokens == report.actual_tokens
    if how == "given":
        assert (report.profile["algorithm"], report.profile["seed"]) == (known.algorithm, known.seed)
        assert report.profile["verified"]
    assert report.profile["block_size"] == known.block_size


@pytest.mark.parametrize("name", KNOWN)
def test_recomputed_keys_are_as_exact_where_events_carry_extra_keys(name: str) -> None:
    known = KNOWN[name]
    report = run(name, Expected(), may_reproduce=False)
    assert report.mismatches == known.mismatches + known.hidden, report.first_mismatches
    assert report.explained == known.explained
    assert report.profile["seed"] == "kvatlas-recomputed"
    tells_extras = name >= "v02"
    assert ("carry no extra keys" in report.inexact) == (not tells_extras)


def test_announcing_hits_again_is_wrong_where_it_is_not_known() -> None:
    report = audit.audit(load("v032-reportfull-b32"), Expected())
    assert report.mismatches == 1
    assert "cannot be counted" in run("v032-reportfull-b32", Expected()).inexact


@pytest.mark.parametrize(
    ("expected", "setting"),
    [
        (Expected(A.SHA256_CBOR, "42", 32), "hashSeed: 7"),
        (Expected(A.SHA256, "7", 32), "prefixCachingHashAlgo: sha256_cbor"),
        (Expected(A.SHA256_CBOR, "7", 64), "blockSize: 32"),
    ],
)
def test_wrong_hash_options_are_named_and_do_no_harm(expected: Expected, setting: str) -> None:
    report = run("v032-salt-b32", expected)
    assert report.mismatches == 0
    assert any(setting in finding for finding in report.findings)


# -- what is explained -------------------------------------------------------------------------------------------------


class Engine:
    """A capture made up: an engine that stores prompts, and requests that hit them."""

    def __init__(self, ranks: int = 1) -> None:
        self._publisher = Publisher(profile())
        self._seqs = [0] * ranks
        self._messages: list[capture.CapturedMessage] = []
        self._requests: list[capture.CapturedRequest] = []

    def publish(self, *events: Any, rank: int = 0) -> None:
        t = 1000.0 + len(self._messages)
        payload = msgspec.msgpack.encode([t, list(events), rank])
        self._messages.append(capture.CapturedMessage(t, (b"kv@e@m", self._seqs[rank].to_bytes(8, "big"), payload)))
        self._seqs[rank] += 1

    def store(self, tokens: list[int], *, cleared: bool = False, rank: int = 0) -> None:
        events = [["AllBlocksCleared"]] if cleared else []
        self.publish(*events, self._publisher.stored(tokens), rank=rank)

    def request(self, tokens: list[int], cached: int, *, rank: int = 0) -> None:
        number = len(self._requests)
        self._requests.append(
            capture.CapturedRequest(number, [*tokens, 0], cached, len(self._messages), rank, None, None, False)
        )

    def audit(self) -> audit.Report:
        return audit.audit(capture.Capture(self._messages, self._requests, ()), Expected())


PROMPT = list(range(3 * SIZE))


def test_the_request_between_a_reset_and_its_event_is_explained() -> None:
    engine = Engine()
    engine.store(PROMPT)
    engine.request(PROMPT, 3 * SIZE)
    engine.request(PROMPT, 0)
    engine.store(PROMPT, cleared=True)
    engine.request(PROMPT, 3 * SIZE)
    report = engine.audit()
    assert (report.requests, report.mismatches, report.explained) == (3, 0, 1)


def test_a_clear_explains_one_request_and_only_one() -> None:
    engine = Engine()
    engine.store(PROMPT)
    engine.request(PROMPT, 0)
    engine.request(PROMPT, 0)
    engine.store(PROMPT, cleared=True)
    report = engine.audit()
    assert (report.mismatches, report.explained) == (1, 1)
    assert report.first_mismatches == [{"request": 1, "predicted": 3 * SIZE, "actual": 0}]


def test_a_clear_explains_nothing_it_does_not_make_equal() -> None:
    engine = Engine()
    engine.store(PROMPT)
    engine.request(PROMPT, SIZE)
    engine.store(PROMPT, cleared=True)
    report = engine.audit()
    assert (report.mismatches, report.explained) == (1, 0)


def test_only_the_next_message_of_the_same_rank_explains() -> None:
    engine = Engine(ranks=2)
    for rank in (0, 1):
        engine.store(PROMPT, rank=rank)
    engine.request(PROMPT, 0, rank=1)
    engine.store(PROMPT, cleared=True, rank=0)
    engine.store(PROMPT, cleared=True, rank=1)
    engine.request(PROMPT, 0, rank=1)
    engine.store(PROMPT, rank=1)
    engine.store(PROMPT, cleared=True, rank=1)
    report = engine.audit()
    assert (report.mismatches, report.explained) == (1, 1)
    assert report.first_mismatches[0]["request"] == 1


def test_a_capture_that_ends_with_a_difference_is_not_explained() -> None:
    engine = Engine()
    engine.store(PROMPT)
    engine.request(PROMPT, 0)
    assert engine.audit().mismatches == 1


def test_an_engine_that_published_nothing_predicts_nothing() -> None:
    engine = Engine()
    engine.request(PROMPT, 0)
    report = engine.audit()
    assert (report.requests, report.mismatches, report.profile) == (1, 0, {})


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_has_the_keys_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["audit", str(CAPTURES / "v032-salt-b32"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    promised = ["requests", "mismatches", "explained", "profile", "predicted_tokens", "actual_tokens"]
    assert list(found) == [*promised, "first_mismatches", "inexact", "findings"]
    assert found["requests"] == 30
    assert HashProfile.parse("sha256_cbor/b32/tagged/seed=7").seed == found["profile"]["seed"]


def test_it_is_readable_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--block-size", "32", "--hash-seed", "42", "--prefix-caching-hash-algo", "sha256_cbor"]
    assert command.main(["audit", str(CAPTURES / "v032-salt-b32"), *options]) == 0
    said = capsys.readouterr().out
    assert "30 requests: 0 mismatches, 0 explained" in said
    assert "hashSeed: 7" in " ".join(said.split())


def test_a_difference_is_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(CAPTURES / "v032-reportfull-b32")
    assert command.main(["audit", folder]) == 1
    assert "request " in capsys.readouterr().out
    assert command.main(["audit", folder, "--reannounces"]) == 0


def test_options_that_make_no_sense_are_turned_away(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["audit", str(CAPTURES / "v032-salt-b32"), "--prefix-caching-hash-algo", "md5"])
    assert left.value.code == 2
    assert "sha256_cbor" in capsys.readouterr().err
    for option in ("--block-size=0", "--block-size=-4", "--block-size=9999999", f"--hash-seed={'x' * 2000}"):
        with pytest.raises(SystemExit) as left:
            command.main(["audit", str(CAPTURES / "v032-salt-b32"), option])
        assert left.value.code == 2
        assert option.split("=")[0] in capsys.readouterr().err


GOOD_MESSAGE: dict[str, Any] = {"t": 1.0, "frames": [base64.b64encode(b"x").decode()] * 3}
GOOD_REQUEST: dict[str, Any] = {"prompt_token_ids": [1], "cached_tokens": 0, "events_before": 1, "body": {}}


def write(folder: Path, *, events: Any = (GOOD_MESSAGE,), requests: Any = (GOOD_REQUEST,)) -> Path:
    for name, lines in (("events.jsonl", events), ("requests.jsonl", requests)):
        text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text)
    return folder


def test_a_capture_may_leave_out_what_is_optional(tmp_path: Path) -> None:
    loaded = capture.load(write(tmp_path, requests=[{**GOOD_REQUEST, "body": None}] * 2))
    assert [(r.number, r.rank, r.model, r.concurrent) for r in loaded.requests] == [
        (0, 0, None, False),
        (1, 0, None, False),
    ]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no message": ({"events": [{"t": 1}]}, "events.jsonl:1"),
    "frames that are not base64": ({"events": [{"t": 1, "frames": ["*"]}]}, "events.jsonl:1"),
    "no JSON": ({"events": "{"}, "events.jsonl"),
    "no object": ({"requests": "[1]\n"}, "requests.jsonl:1"),
    "no tokens": ({"requests": [{"cached_tokens": 0}]}, "requests.jsonl:1"),
    "cached tokens not told": ({"requests": [{**GOOD_REQUEST, "cached_tokens": None}]}, "requests.jsonl:1"),
    "a salt that is no text": ({"requests": [{**GOOD_REQUEST, "body": {"cache_salt": 5}}]}, "requests.jsonl:1"),
    "a body that is none": ({"requests": [{**GOOD_REQUEST, "body": "x"}]}, "requests.jsonl:1"),
    "events that are missing": ({"requests": [{**GOOD_REQUEST, "events_before": 2}]}, "events_before"),
    "requests out of order": ({"requests": [GOOD_REQUEST, {**GOOD_REQUEST, "events_before": 0}]}, "events_before"),
    "a number that is none": ({"requests": '{"prompt_token_ids": [1], "cached_tokens": Infinity}'}, "requests.jsonl:1"),
}


@pytest.mark.parametrize(("lines", "named"), BAD.values(), ids=BAD)
def test_a_bad_capture_is_named_with_its_line(
    lines: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["audit", str(write(tmp_path, **lines))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert named in printed.err
    assert str(tmp_path) in printed.err


def test_a_capture_that_is_not_there_or_broken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["audit", str(tmp_path / "nowhere")]) == 2
    assert "kvatlas record" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(CAPTURES / "v032-salt-b32", broken)
    packed = (broken / "events.jsonl.gz").read_bytes()
    for damaged in (packed[:500], b"no gzip", gzip.compress(b"\xff\xfe"), packed[:300] + b"\0" * 50 + packed[350:]):
        (broken / "events.jsonl.gz").write_bytes(damaged)
        assert command.main(["audit", str(broken)]) == 2
        assert "events.jsonl.gz" in capsys.readouterr().err
    shutil.copy(CAPTURES / "v032-salt-b32" / "events.jsonl.gz", broken)
    (broken / "models.json").write_text("{")
    assert command.main(["audit", str(broken)]) == 2
    assert "models.json" in capsys.readouterr().err


def test_messages_that_are_none_cost_themselves_only(tmp_path: Path) -> None:
    folder = tmp_path / "noisy"
    shutil.copytree(CAPTURES / "v032-salt-b32", folder)
    lines = gzip.decompress((folder / "events.jsonl.gz").read_bytes()).splitlines()
    (folder / "events.jsonl.gz").unlink()
    noise = json.dumps({"t": 1.0, "frames": [base64.b64encode(b"?").decode()]}).encode()
    (folder / "events.jsonl").write_bytes(b"\n".join([*lines, noise]))
    assert audit.audit(capture.load(folder), Expected()).mismatches == 0
