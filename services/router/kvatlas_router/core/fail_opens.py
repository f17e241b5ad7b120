"""How many of the latest decisions were not made by the first policy of their plan, and why.

A request that is not is answered all the same, and so nobody notices. It is a finding when it is the rule: at least
`MANY` of the last `RECENT` decisions, and half of them, for the same cause, within `WITHIN_S`.
"""

from __future__ import annotations

from collections import Counter, deque

from kvatlas_common.findings import Code, Finding

RECENT, MANY = 64, 8
WITHIN_S = 60.0

_CHANGES = {
    "index-unavailable": (
        "no indexer is up, or none is reached",
        "start one, and name it with --indexer <host:port> (its gRPC port, 50051)",
    ),
    "deadline": (
        "lookups take longer than --lookup-deadline-ms: the indexer is overloaded, or far away",
        "run the indexer nearer or more of them, or raise --lookup-deadline-ms (20)",
    ),
    "index-error": ("the indexer, or its store, fails", "see the indexer's own findings and log"),
    "unknown-model": (
        "the indexer knows no engine that serves the model",
        "have the engines' events reach the indexer: see its own findings",
    ),
    "unknown-profile": (
        "no engine's hash settings are known: no event of theirs has come that shows them",
        "have the engines' events reach the indexer (see its own findings), or configure hashSeed, blockSize and "
        "prefixCachingHashAlgo there",
    ),
    "unknown-engines": (
        "nothing is known of the cache of any engine that serves the model",
        "have the engines' events reach the indexer: see its own findings",
    ),
    "tokenizer": (
        "prompts can be tokenised neither here nor by an engine",
        "give the router the model's files: --model-files <model>=<folder>; let engines serve /tokenize",
    ),
    "defect": ("an error of the router's own", "report the place that its log names"),
}
"""Cause of a fail-open -> what is likely behind it, and the change to make."""
UNRENDERABLE = "unrenderable"


class FailOpens:
    """`now` in seconds of any clock."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, str | None]] = deque(maxlen=RECENT)

    def decided(self, cause: str | None, now: float) -> None:
        """`cause`: why not by the first policy; None: it was."""
        self._latest.append((now, cause))

    def findings(self, now: float) -> list[Finding]:
        recent = [cause for at, cause in self._latest if now - at <= WITHIN_S]
        found: list[Finding] = []
        for kind, count in Counter(cause.partition(":")[0] for cause in recent if cause is not None).items():
            if count < MANY or 2 * count < len(recent):
                continue
            if kind == UNRENDERABLE:
                whys = Counter(cause.partition(":")[2] for cause in recent if cause and cause.startswith(kind))
                found.append(_unrenderable(count, len(recent), whys.most_common(1)[0][0]))
            elif kind in _CHANGES:
                cause, change = _CHANGES[kind]
                wrong = f"{count} of the last {len(recent)} requests were not routed by their policy: {kind}"
                found.append(Finding(Code.FAILING_OPEN, wrong, cause, change))
        return found


def _unrenderable(count: int, recent: int, why: str) -> Finding:
    return Finding(
        Code.UNRENDERABLE,
        f"{count} of the last {recent} requests cannot be rendered here, and go by session or load: {why[:80]}",
        "clients send what only an engine can render: a chat_template of their own, media, a stored response",
        "where clients send a chat_template, have them leave it out: vLLM refuses it too, unless started with "
        "--trust-request-chat-template",
    )
