"""`kvatlas audit`: replays a capture through the real decoder, stream and index, and holds the index to the engine.

For every request the index predicts, from the messages that had arrived before it, how many tokens the engine would
serve from its cache; the engine's own `cached_tokens` says how many it did. They must be equal. One kind of difference
is explained: an engine publishes a reset with its *next* step, so the one request in between differs, and is equal when
the AllBlocksCleared of the next message is applied first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from kvatlas_cli import capture
from kvatlas_common.blocks.extras import UnknownExtra
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import BLOCK_SIZE_MAX, Algorithm, ExtraKeys, HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import AllBlocksCleared
from kvatlas_common.findings import Code, Finding
from kvatlas_common.fleet import Health
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.index import KvIndex, Rules
from kvatlas_indexer.core.naming import Expected

ADDRESS, MODEL = "capture:8000", "captured"
FIRST_MISMATCHES = 10


@dataclass(slots=True)
class Report:
    """What an audit found; `mismatches` leaves out those that are explained."""

    requests: int = 0
    mismatches: int = 0
    explained: int = 0
    profile: dict[str, Any] = field(default_factory=dict)
    predicted_tokens: int = 0
    actual_tokens: int = 0
    first_mismatches: list[dict[str, int]] = field(default_factory=list)
    inexact: str = ""  # why the index itself does not claim to be exact
    findings: list[str] = field(default_factory=list)


def audit(
    captured: capture.Capture, expected: Expected, *, may_reproduce: bool = True, reannounces: bool = False
) -> Report:
    return _Audit(captured, Rules(expected, may_reproduce), reannounces).run()


class _Audit:
    def __init__(self, captured: capture.Capture, rules: Rules, reannounces: bool) -> None:
        self._capture = captured
        self._report = Report()
        self._rules = rules
        self._reannounces = reannounces
        self._index = self._new_index(self._find)
        self._applied = 0
        self._explained_by: set[int] = set()

    def run(self) -> Report:
        for request in self._capture.requests:
            self._apply_until(request.events_before)
            if not request.concurrent:
                self._hold(request)
        self._apply_until(len(self._capture.messages))
        engines = self._index.engines()
        self._report.profile = _described(engines[0].naming.profile, engines[0].naming.verified) if engines else {}
        self._report.inexact = "; ".join(dict.fromkeys(e.inexact_reason for e in engines if e.inexact_reason))
        return self._report

    def _find(self, engine: EngineId | None, finding: Finding) -> None:
        if finding.text not in self._report.findings and len(self._report.findings) < FIRST_MISMATCHES:
            self._report.findings.append(finding.text)

    def _new_index(self, on_finding: Callable[[EngineId | None, Finding], None]) -> KvIndex:
        index, now = KvIndex(self._rules, on_finding=on_finding), 0.0
        index.on_specs([EngineSpec(ADDRESS, f"http://{ADDRESS}", reannounces=self._reannounces)], now)
        models = frozenset({MODEL})
        index.on_facts(EngineFacts(EngineId(ADDRESS), Health.READY, models, self._capture.adapters), now)
        return index

    def _apply_until(self, count: int) -> None:
        for message in self._capture.messages[self._applied : count]:
            self._apply(self._index, message.frames, message.t)
        self._applied = max(self._applied, count)

    def _apply(self, index: KvIndex, frames: Sequence[bytes], t: float) -> None:
        index.on_frames(frames, t, peer=None, dialled=EngineId(ADDRESS), port_rank=0)

    def _hold(self, request: capture.CapturedRequest) -> None:
        predicted, actual = self._predict(self._index, request), request.cached_tokens
        self._report.requests += 1
        self._report.predicted_tokens += predicted
        self._report.actual_tokens += actual
        if predicted == actual:
            return
        if self._is_explained(request):
            self._report.explained += 1
            return
        self._report.mismatches += 1
        if len(self._report.first_mismatches) < FIRST_MISMATCHES:
            found = {"request": request.number, "predicted": predicted, "actual": actual}
            self._report.first_mismatches.append(found)

    def _predict(self, index: KvIndex, request: capture.CapturedRequest) -> int:
        engine = EngineId(ADDRESS, request.rank)
        view = index.fleet().engines.get(engine)
        if view is None or view.profile is None:
            return 0
        profile = HashProfile.parse(view.profile)
        try:
            keys = prompt_keys(profile, request.prompt_token_ids, request.extras(self._capture.adapters))
        except UnknownExtra as unknown:
            self._find(engine, Finding(Code.EXTRA_KEYS_NOT_REPRODUCIBLE, str(unknown)))
            return 0
        answer = index.match(MODEL, {view.profile: keys.tolist()}, [engine])
        return sum(match.blocks for match in answer.matches) * profile.block_size

    def _is_explained(self, request: capture.CapturedRequest) -> bool:
        """At most one request per clear."""
        following = self._next_of(request)
        if following is None or following in self._explained_by:
            return False
        topic, seq, payload = self._capture.messages[following].frames
        batch = decode_batch(payload)
        if not any(isinstance(event, AllBlocksCleared) for event in batch.events):
            return False
        cleared = self._new_index(lambda engine, finding: None)
        for message in self._capture.messages[: request.events_before]:
            self._apply(cleared, message.frames, message.t)
        only_the_clear = msgspec.msgpack.encode([batch.ts, [["AllBlocksCleared"]], batch.rank])
        self._apply(cleared, [topic, seq, only_the_clear], batch.ts)
        if self._predict(cleared, request) != request.cached_tokens:
            return False
        self._explained_by.add(following)
        return True

    def _next_of(self, request: capture.CapturedRequest) -> int | None:
        """The place of the next message of the request's engine; ranks share a capture."""
        for place in range(request.events_before, len(self._capture.messages)):
            try:
                _, _, payload = self._capture.messages[place].frames
                if (decode_batch(payload).rank or 0) == request.rank:
                    return place
            except ValueError:  # not three frames, or a payload that is none
                continue
        return None


def _described(profile: HashProfile | None, verified: bool) -> dict[str, Any]:
    if profile is None:
        return {}
    return {
        "algorithm": str(profile.algorithm),
        "seed": profile.seed,
        "block_size": profile.block_size,
        "extra_keys": str(profile.extra_keys),
        "verified": verified,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "capture", type=Path, metavar="DIR", help="folder with events.jsonl[.gz] and requests.jsonl[.gz]"
    )
    parser.add_argument("--block-size", type=_block_size, metavar="N", help="tokens per block; discovered if not given")
    parser.add_argument(
        "--hash-seed", type=_seed, metavar="SEED", help="PYTHONHASHSEED of the engine; discovered if not given"
    )
    parser.add_argument(
        "--prefix-caching-hash-algo", choices=[str(algorithm) for algorithm in Algorithm], metavar="ALGO",
        help=f"one of {', '.join(Algorithm)}; discovered if not given",
    )  # fmt: skip
    parser.add_argument(
        "--recompute-keys", action="store_true",
        help="do not reproduce the engine's hashes even where that is possible: recompute keys from token ids",
    )  # fmt: skip
    parser.add_argument(
        "--reannounces", action="store_true",
        help="the engine's events repeat blocks it merely hit (kv_cache_report_mode full): do not count copies",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def _block_size(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= BLOCK_SIZE_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens within 1..{BLOCK_SIZE_MAX}")
    return int(text)


def _seed(text: str) -> str:
    try:
        return HashProfile(Algorithm.SHA256, text, 1, ExtraKeys.TAGGED).seed
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 if every difference is explained, 1 if one is not, 2 if there is no capture to read."""
    try:
        captured = capture.load(arguments.capture)
    except capture.BadCapture as error:
        print(f"kvatlas audit: {error}", file=sys.stderr)
        return 2
    algorithm = arguments.prefix_caching_hash_algo
    expected = Expected(Algorithm(algorithm) if algorithm else None, arguments.hash_seed, arguments.block_size)
    report = audit(captured, expected, may_reproduce=not arguments.recompute_keys, reannounces=arguments.reannounces)
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(report)))
    else:
        _print(report)
    return 1 if report.mismatches else 0


def _print(report: Report) -> None:
    console = Console(highlight=False)
    share = report.actual_tokens and report.predicted_tokens / report.actual_tokens
    console.print(
        f"{report.requests} requests: {report.mismatches} mismatches, {report.explained} explained by a reset"
    )
    console.print(f"cached tokens: predicted {report.predicted_tokens}, actual {report.actual_tokens} ({share:.4f})")
    console.print(f"profile: {report.profile or 'not found'}")
    if report.inexact:
        console.print(f"inexact: {report.inexact}")
    for finding in report.findings:
        console.print(f"finding: {finding}")
    for mismatch in report.first_mismatches:
        console.print("request {request}: predicted {predicted}, actual {actual}".format(**mismatch))
