"""How an engine hashes, held against the configuration and against the other engines of its model.

What is known of an engine, the surest first: the profile that a root block has proven; what its `/metrics` say of its
algorithm and block size. Of a seed nothing is said anywhere: where no known seed fits, it is another one, or none (up
to vLLM 0.27 an engine without PYTHONHASHSEED takes a random one; 0.32 a fixed one, but for xxhash).

| it differs from ...                      | so the change to make is                                   |
|------------------------------------------|------------------------------------------------------------|
| the configuration, as do its peers       | the configuration's                                        |
| the configuration, but its peers do not  | its own                                                    |
| the configuration, and it has no peers   | one of the two                                             |
| its peers, and nothing is configured     | its own                                                    |

Where settings differ nothing is lost but time: an engine whose hashes can be reproduced is looked up by its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, HashProfile
from kvatlas_common.findings.vocabulary import Code, Finding

XXHASH = frozenset({Algorithm.XXHASH, Algorithm.XXHASH_CBOR})
SEED_FIXED_SINCE = (0, 28)
"""Up to 0.27 a seed that is not set is random (FACTS: measured on 0.27 and 0.32)."""


class Aspect(StrEnum):
    ALGORITHM = "algorithm"
    BLOCK_SIZE = "block size"
    SEED = "seed"


_CODES = {
    Aspect.ALGORITHM: Code.ALGORITHM_DIFFERS,
    Aspect.BLOCK_SIZE: Code.BLOCK_SIZE_DIFFERS,
    Aspect.SEED: Code.SEED_DIFFERS,
}
_SETTINGS = {
    Aspect.ALGORITHM: ("--prefix-caching-hash-algo", "prefixCachingHashAlgo"),
    Aspect.BLOCK_SIZE: ("--block-size", "blockSize"),
    Aspect.SEED: ("--hash-seed", "hashSeed"),
}


@dataclass(frozen=True, slots=True)
class Hashing:
    """Hash settings as far as they are known; None: they are not. `algorithm` may be one that nobody can reproduce."""

    algorithm: str | None = None
    block_size: int | None = None
    seed: str | None = None

    @classmethod
    def of(cls, profile: HashProfile) -> Hashing:
        return cls(str(profile.algorithm), profile.block_size, profile.seed)

    def get(self, aspect: Aspect) -> str | int | None:
        return {Aspect.ALGORITHM: self.algorithm, Aspect.BLOCK_SIZE: self.block_size, Aspect.SEED: self.seed}[aspect]

    def fits(self, wanted: Hashing) -> bool:
        """Whether it is as wanted, as far as anything is."""
        return (
            wanted.algorithm in (None, self.algorithm)
            and wanted.block_size in (None, self.block_size)
            and wanted.seed in (None, self.seed)
        )

    def or_else(self, other: Hashing) -> Hashing:
        return Hashing(
            other.algorithm if self.algorithm is None else self.algorithm,
            other.block_size if self.block_size is None else self.block_size,
            other.seed if self.seed is None else self.seed,
        )


@dataclass(frozen=True, slots=True)
class Peers:
    """What most engines of a model do, another than this one: so many of them, `example` is one."""

    hashing: Hashing
    count: int
    example: str

    @property
    def words(self) -> str:
        return f"engine {self.example}" if self.count == 1 else f"{self.count} other engines ({self.example})"


class Crowd:
    """What the engines of each model have been proven to do. All are added before any is asked about."""

    def __init__(self, configured: Hashing = Hashing()) -> None:
        self._configured = configured
        self._models: dict[str, dict[Hashing, set[str]]] = {}
        self._most: dict[str, Peers] = {}

    def add(self, model: str, engine: str, does: Hashing) -> None:
        self._models.setdefault(model, {}).setdefault(does, set()).add(engine)

    def peers(self, model: str, engine: str, does: Hashing) -> tuple[Peers | None, int]:
        """What most engines of the model do, None where this is one of them; and how many others do what it does.

        Of equally many those that do as configured, then those with the lowest name: of two that differ, one is named.
        """
        of_model = self._models.get(model, {})
        doing = of_model.get(does, ())
        alike = len(doing) - (engine in doing)
        if not of_model:
            return None, alike
        most = self._most.get(model) or self._most.setdefault(model, self._peers(of_model))
        return (None if most.hashing == does else most), alike

    def _peers(self, of_model: Mapping[Hashing, set[str]]) -> Peers:
        def rank(group: tuple[Hashing, set[str]]) -> tuple[int, bool, str]:
            return -len(group[1]), not group[0].fits(self._configured), min(group[1])

        hashing, names = min(of_model.items(), key=rank)
        return Peers(hashing, len(names), min(names))


@lru_cache(maxsize=1024)
def hashing_of(profile: str) -> Hashing:
    """`profile`: the name of one. Raises `ValueError`."""
    return Hashing.of(HashProfile.parse(profile))


def hash_findings(
    does: Hashing,
    *,
    configured: Hashing = Hashing(),
    peers: Peers | None = None,
    alike: int = 0,
    reproducible: bool = True,
    version: tuple[int, int] | None = None,
) -> list[Finding]:
    """`does`: what the engine is known to do. `alike`: how many others do the very same.

    `reproducible`: False once its hashes have fitted nothing. `version` of vLLM, where it says.
    """
    if reproducible and peers is None and does.fits(configured):
        return []
    found = [_differing(aspect, does, configured, peers, alike) for aspect in Aspect]
    findings = [finding for finding in found if finding is not None]
    if reproducible:
        return findings
    if any(finding.code is Code.ALGORITHM_DIFFERS for finding in findings):
        return findings  # which is reason enough
    wanted = configured.seed if configured.seed is not None else (peers.hashing.seed if peers else None)
    return [*findings, _seed_unknown(does, wanted, configured.seed is not None, version)]


def _differing(aspect: Aspect, does: Hashing, configured: Hashing, peers: Peers | None, alike: int) -> Finding | None:
    actual, wanted = does.get(aspect), configured.get(aspect)
    if actual is None:
        return None
    flag, setting = _SETTINGS[aspect]
    theirs = peers.hashing.get(aspect) if peers else None
    shown = _shown(aspect, actual)
    if wanted is not None and wanted != actual:
        wrong = f"it hashes with {aspect} {shown}, configured is {_shown(aspect, wanted)} ({setting})"
        in_config = f"set {setting}: {_quoted(str(actual))} ({flag} {_quoted(str(actual))}) for the indexer"
        if peers is not None and theirs == wanted:
            cause = f"it was started with other settings than {peers.words}"
            return Finding(_CODES[aspect], wrong, cause, f"start this engine with {_starting(aspect, wanted)}")
        if alike or (peers is not None and theirs == actual):
            return Finding(_CODES[aspect], wrong, "the other engines of its model do so too", in_config)
        change = f"start the engine with {_starting(aspect, wanted)}, or {in_config}"
        return Finding(_CODES[aspect], wrong, "the engine was started with other settings than configured", change)
    if wanted is None and peers is not None and theirs is not None and theirs != actual:
        wrong = f"it hashes with {aspect} {shown}, {peers.words} with {_shown(aspect, theirs)}"
        cause = "it was started with other settings"
        return Finding(_CODES[aspect], wrong, cause, f"start this engine with {_starting(aspect, theirs)}")
    return None


def _seed_unknown(does: Hashing, wanted: str | None, configured: bool, version: tuple[int, int] | None) -> Finding:
    lost = "keys are recomputed from its token ids, which costs time"
    cause = _no_seed(does.algorithm, version)
    if wanted is None:
        change = "start all engines with PYTHONHASHSEED=42 (or any other, the same for all)"
        return Finding(Code.HASHES_NOT_REPRODUCIBLE, f"its block hashes fit no seed known here: {lost}", cause, change)
    whose = "configured (hashSeed)" if configured else "that of the other engines"
    wrong = f"its block hashes do not fit seed {_quoted(wanted)}, {whose}, nor any other known here: {lost}"
    change = f"start this engine with {_starting(Aspect.SEED, wanted)}"
    return Finding(Code.SEED_DIFFERS, wrong, f"{cause}, or it is another", change)


def _no_seed(algorithm: str | None, version: tuple[int, int] | None) -> str:
    random = "its PYTHONHASHSEED is not set, so that its seed is random"
    if algorithm in XXHASH:
        return f"{random} (as with {algorithm} in every version of vLLM)"
    if version is not None and version < SEED_FIXED_SINCE:
        return f"{random} (as up to vLLM 0.27; it is {version[0]}.{version[1]})"
    if version is not None:
        return "its PYTHONHASHSEED is set to a value not known here"
    return random


def _starting(aspect: Aspect, value: str | int) -> str:
    if aspect is not Aspect.SEED:
        return f"{_SETTINGS[aspect][0]} {value}"
    if value == FIXED_SEED:
        return "PYTHONHASHSEED not set in its environment"
    return f"PYTHONHASHSEED={value} in its environment"


def _shown(aspect: Aspect, value: str | int) -> str:
    if aspect is Aspect.SEED and value == FIXED_SEED:
        return "none (its PYTHONHASHSEED is not set)"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    return text if text.isprintable() and text == text.strip() and text else repr(text)
