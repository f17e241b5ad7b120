"""Who may speak for an engine, when several do."""

from __future__ import annotations

import pytest

from kvatlas_common.events.types import Topic
from kvatlas_common.findings import Code
from kvatlas_indexer.core.claims import Claims

LEASE_S = 15.0
OWNER, STRANGER, OTHER = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def refused(claims: Claims, peer: str, now: float, host: str = OWNER) -> bool:
    topic = Topic(host, 8000, "tiny")
    why = claims.refusal(f"{host}:8000", topic, peer, dialled=False, models=frozenset({"tiny"}), now=now)
    return why is not None


def test_the_first_who_speaks_keeps_a_name_while_it_speaks() -> None:
    claims = Claims(lease_s=LEASE_S)
    assert not refused(claims, STRANGER, 0, host="engine-a")
    assert not refused(claims, STRANGER, 10, host="engine-a")
    assert refused(claims, OTHER, 24, host="engine-a")
    assert not refused(claims, OTHER, 25, host="engine-a"), "silent for a whole lease"
    assert refused(claims, STRANGER, 26, host="engine-a")


@pytest.mark.parametrize("host", [OWNER, "[fd00::1]"])
def test_a_name_that_is_the_speakers_own_address_is_nobody_elses(host: str) -> None:
    owner = host.strip("[]")
    claims = Claims(lease_s=LEASE_S)
    assert not refused(claims, STRANGER, 0, host), "it may be a proxy, as long as nobody says otherwise"
    assert not refused(claims, owner, 1, host), "the owner need not wait for the lease"
    assert refused(claims, STRANGER, 2, host)
    assert refused(claims, STRANGER, 1000, host), "the owner was merely idle"


def test_refusals_name_the_parties() -> None:
    claims = Claims(lease_s=LEASE_S)
    topic = Topic(OWNER, 8000, "other")
    twice = claims.refusal("a:1", topic, STRANGER, dialled=True, models=frozenset(), now=0)
    assert twice is not None
    assert (twice.code, "is dialled" in twice.wrong) == (Code.NAME_CLAIMED_TWICE, True)
    why = claims.refusal("a:1", topic, STRANGER, dialled=False, models=frozenset({"tiny"}), now=0)
    assert why is not None
    assert why.code is Code.TOPIC_MODEL
    assert all(part in why.wrong for part in (STRANGER, "a:1", "'other'", "tiny"))
    assert '"kv@a:1@tiny"' in why.change
