"""What is wrong, as a router sees it: its indexers, its engines, its tokens, and how it decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvatlas_common.findings import Code, Finding
from kvatlas_common.findings.engine import down
from kvatlas_common.fleet import Fleet, Health


@dataclass(frozen=True, slots=True)
class Seen:
    """All that is looked at. `indexers_lost`: address -> why its stream is down; `tokens`: engine address -> finding.

    `untokenised`: model -> why its files cannot be used; `reannouncing`: clients may make engines announce hits again.
    """

    fleet: Fleet
    indexers_lost: Mapping[str, str] = field(default_factory=dict)
    indexers_up: int = 0
    tokens: Mapping[str, Finding] = field(default_factory=dict)
    untokenised: Mapping[str, str] = field(default_factory=dict)
    deciding: tuple[Finding, ...] = ()
    reannouncing: bool = False


def diagnose(seen: Seen) -> Iterator[tuple[object, Finding]]:
    """What is wrong, and with what: an indexer, an engine, a model, or ("") the router."""
    for address, why in seen.indexers_lost.items():
        yield address, _unreachable(address, why, seen.indexers_up)
    if not seen.fleet.engines:
        change = "name an indexer with --indexer <host:port>, or engines with --engine <host:port>"
        yield "", Finding(Code.NO_ENGINES, "no engine is known", "no indexer tells of any, and none is listed", change)
    for engine, view in seen.fleet.engines.items():
        if view.health is Health.DOWN:
            yield engine, down("")
    yield from seen.tokens.items()
    for model, why in seen.untokenised.items():
        yield model, _untokenised(model, why)
    for finding in seen.deciding:
        yield "", finding
    if seen.reannouncing:
        yield "", _REANNOUNCING


def _unreachable(address: str, why: str, others: int) -> Finding:
    left = f"{others} other(s) answer" if others else "none other is up, and requests are routed without an index"
    return Finding(
        Code.INDEXER_UNREACHABLE,
        f"the indexer at {address} is not reached ({why}); {left}",
        "it is down, or --indexer names another port than that of its gRPC (50051; 8081 is REST), or a firewall is "
        "between",
        "start it, or correct --indexer <host:port>",
    )


def _untokenised(model: str, why: str) -> Finding:
    return Finding(
        Code.TOKENIZER_MISSING,
        f"prompts for {model} cannot be tokenised here, so an engine is asked each time: {why}",
        "the files are not on this machine under the name the engines give them",
        f"--model-files {model}=<folder with tokenizer.json and the chat template>",
    )


_REANNOUNCING = Finding(
    Code.REANNOUNCING_ALLOWED,
    "clients may send vllm_xargs.kv_cache_report_mode, which makes engines (vLLM 0.32) announce blocks they merely hit",
    "--allow-kv-cache-report-mode was given",
    "take it away; or write reannounces=true at --engine for the indexer, so that copies are not counted",
)
