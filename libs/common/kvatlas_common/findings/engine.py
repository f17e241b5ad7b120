"""What an engine says of itself that is wrong, or will be: its health, its version, its cache's configuration."""

from __future__ import annotations

import re

from kvatlas_common.engines.facts import EngineFacts
from kvatlas_common.findings.vocabulary import Code, Finding
from kvatlas_common.fleet import Health

EXTRA_KEYS_SINCE = (0, 22)
"""Before, events do not name what is in a hash besides tokens (salts, media)."""

_VERSION = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?!\d)")


def version_of(text: str | None) -> tuple[int, int] | None:
    """Major and minor of `0.32.0+cpu`; None for anything else."""
    found = _VERSION.match(text or "")
    return (int(found[1]), int(found[2])) if found else None


def self_findings(facts: EngineFacts, *, ranks: int) -> list[Finding]:
    """`ranks`: how many it is configured to have. An engine that is down says nothing else."""
    if facts.health is Health.DOWN:
        return [down(facts.error)]
    found: list[Finding] = []
    if facts.error and facts.health is Health.READY:
        change = "serve it as vLLM does; where it wants an API key, name that with api-key-env=NAME at --engine"
        found.append(Finding(Code.ENGINE_UNREADABLE, f"not all it says can be read: {facts.error}", change=change))
    if facts.cache is not None and facts.cache.enable_prefix_caching is False:
        wrong, change = "its prefix caching is off: nothing it computes is used again", "--enable-prefix-caching"
        cause = "--no-enable-prefix-caching, or a model or feature that vLLM turns it off for"
        found.append(Finding(Code.CACHING_OFF, wrong, cause, f"start it with {change}"))
    if facts.ranks_seen > ranks:
        found.append(_ranks(facts, ranks))
    version = version_of(facts.version)
    if version is not None and version < EXTRA_KEYS_SINCE:
        wrong = f"it is vLLM {facts.version}: its events do not tell which requests had a cache_salt"
        cause = "events name extra keys from vLLM 0.22 on"
        change = "upgrade to 0.22 or later, or set PYTHONHASHSEED and hashSeed, so that its hashes can be reproduced"
        found.append(Finding(Code.SALTS_UNSEEN, wrong, cause, change))
    return found


def down(why: str) -> Finding:
    wrong = f"it does not answer: {why}" if why else "it does not answer"
    change = "start it, or take it off the list; check its port, and that nothing between blocks it"
    return Finding(Code.ENGINE_DOWN, wrong, "", change)


def _ranks(facts: EngineFacts, ranks: int) -> Finding:
    seen = facts.ranks_seen
    return Finding(
        Code.RANKS_NOT_LISTED,
        f"it has {seen} data-parallel ranks, and {ranks} is known here: what the others hold is not found",
        "rank N publishes its events at the port plus N, and every rank is an engine of its own",
        f"write --engine {facts.id.address},ranks={seen},... (dialled), --listen-ranks {seen} (connecting)",
    )
