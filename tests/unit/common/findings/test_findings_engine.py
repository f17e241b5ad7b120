"""What an engine says of itself that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvatlas_common.engines.facts import EngineFacts
from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.findings import Code
from kvatlas_common.findings.engine import self_findings, version_of
from kvatlas_common.fleet import Health
from kvatlas_common.words import EngineId

WELL = EngineFacts(EngineId("a:1"), Health.READY, cache=CacheConfig(64, 100), version="0.32.0", ranks_seen=1)


@pytest.mark.parametrize(
    ("facts", "codes"),
    [
        (WELL, []),
        (EngineFacts(EngineId("a:1")), []),
        (replace(WELL, health=Health.DOWN, error="nobody listens there"), [Code.ENGINE_DOWN]),
        (replace(WELL, error="/metrics answered 401"), [Code.ENGINE_UNREADABLE]),
        (replace(WELL, cache=CacheConfig(enable_prefix_caching=False)), [Code.CACHING_OFF]),
        (replace(WELL, ranks_seen=4), [Code.RANKS_NOT_LISTED]),
        (replace(WELL, version="0.10.0"), [Code.SALTS_UNSEEN]),
    ],
)
def test_each_is_named(facts: EngineFacts, codes: list[Code]) -> None:
    found = self_findings(facts, ranks=1)
    assert [finding.code for finding in found] == codes
    assert all(finding.change for finding in found)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.32.0+cpu", (0, 32)),
        ("v0.10.0", (0, 10)),
        ("0.27.1.dev3+g1", (0, 27)),
        ("main", None),
        ("", None),
        (None, None),
    ],
)
def test_versions(text: str | None, version: tuple[int, int] | None) -> None:
    assert version_of(text) == version
