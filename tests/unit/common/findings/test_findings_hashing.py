"""How an engine hashes, against the configuration and its peers: who is to change what."""

from __future__ import annotations

import pytest

from kvatlas_common.blocks.profile import FIXED_SEED
from kvatlas_common.findings import Code
from kvatlas_common.findings.hashing import Crowd, Hashing, Peers, hash_findings, hashing_of

USUAL = Hashing("sha256_cbor", 64, "42")
PEERS = Peers(USUAL, 3, "b:1")


def differing(**changed: object) -> Hashing:
    said = {"algorithm": USUAL.algorithm, "block_size": USUAL.block_size, "seed": USUAL.seed, **changed}
    return Hashing(**said)  # type: ignore[arg-type]


ASPECTS = [
    ({"seed": "7"}, Code.SEED_DIFFERS, "PYTHONHASHSEED=42", "hashSeed: 7"),
    ({"algorithm": "sha256"}, Code.ALGORITHM_DIFFERS, "--prefix-caching-hash-algo sha256_cbor",
     "prefixCachingHashAlgo: sha256"),
    ({"block_size": 16}, Code.BLOCK_SIZE_DIFFERS, "--block-size 64", "blockSize: 16"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "code", "engine", "configuration"), ASPECTS)
def test_who_is_to_change_what(changed: dict[str, object], code: Code, engine: str, configuration: str) -> None:
    does = differing(**changed)
    (against_both,) = hash_findings(does, configured=USUAL, peers=PEERS)
    (against_peers,) = hash_findings(does, peers=PEERS)
    (all_alike,) = hash_findings(does, configured=USUAL, alike=2)
    (alone,) = hash_findings(does, configured=USUAL)
    assert {found.code for found in (against_both, against_peers, all_alike, alone)} == {code}
    assert f"start this engine with {engine}" in against_both.change
    assert f"start this engine with {engine}" in against_peers.change
    assert f"set {configuration}" in all_alike.change
    assert engine not in all_alike.change
    assert engine in alone.change
    assert f"set {configuration}" in alone.change


def test_what_is_not_known_or_not_configured_is_not_wrong() -> None:
    assert hash_findings(USUAL, configured=USUAL, peers=None, alike=3) == []
    assert hash_findings(Hashing(), configured=USUAL, peers=PEERS) == []
    assert hash_findings(USUAL, configured=Hashing(seed="42")) == []


@pytest.mark.parametrize(
    ("algorithm", "version", "cause"),
    [
        ("sha256", (0, 10), "up to vLLM 0.27"),
        ("xxhash_cbor", (0, 32), "in every version"),
        ("sha256", (0, 32), "set to a value not known here"),
        (None, None, "PYTHONHASHSEED is not set"),
    ],
)
def test_a_seed_that_fits_nothing(algorithm: str | None, version: tuple[int, int] | None, cause: str) -> None:
    does = Hashing(algorithm, 64)
    (configured,) = hash_findings(does, configured=Hashing(seed="42"), reproducible=False, version=version)
    (nothing,) = hash_findings(does, reproducible=False, version=version)
    assert (configured.code, nothing.code) == (Code.SEED_DIFFERS, Code.HASHES_NOT_REPRODUCIBLE)
    assert cause in configured.cause
    assert cause in nothing.cause
    assert "PYTHONHASHSEED=42" in configured.change


def test_another_algorithm_is_reason_enough_for_hashes_that_fit_nothing() -> None:
    found = hash_findings(Hashing("builtin", 64), configured=USUAL, reproducible=False)
    assert [finding.code for finding in found] == [Code.ALGORITHM_DIFFERS]


def test_the_seed_of_none_is_written_as_such() -> None:
    (found,) = hash_findings(
        USUAL, configured=differing(seed=FIXED_SEED), peers=Peers(differing(seed=FIXED_SEED), 2, "b:1")
    )
    assert "PYTHONHASHSEED not set in its environment" in found.change


def crowd(configured: Hashing, **engines: Hashing) -> Crowd:
    made = Crowd(configured)
    for name, does in engines.items():
        made.add("m", name, does)
    return made


def test_most_of_a_model_are_the_measure() -> None:
    other = differing(seed="7")
    made = crowd(Hashing(), a=other, b=USUAL, c=USUAL)
    assert made.peers("m", "a", other) == (Peers(USUAL, 2, "b"), 0)
    assert made.peers("m", "b", USUAL) == (None, 1)
    assert made.peers("another model", "x", USUAL) == (None, 0)


def test_of_two_that_differ_one_is_named() -> None:
    other = differing(seed="7")
    undecided, decided = crowd(Hashing(), a=other, b=USUAL), crowd(Hashing(seed="42"), a=other, b=USUAL)
    assert undecided.peers("m", "a", other) == (None, 0)
    assert undecided.peers("m", "b", USUAL) == (Peers(other, 1, "a"), 0)
    assert decided.peers("m", "a", other) == (Peers(USUAL, 1, "b"), 0)


def test_a_profile_says_how_it_hashes() -> None:
    assert hashing_of("sha256_cbor/b64/tagged/seed=42") == USUAL
