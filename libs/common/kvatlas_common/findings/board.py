"""What is wrong now: findings appear, last, and clear when their cause is gone.

Two ways in. A look at the deployment says all it found at once (`hold`): what it no longer finds is cleared. What
happens is put down when it happens (`note`), and holds until it has not happened again for `noted_s`. A finding is
about something, an engine as a rule, by its name; of one code and one name there is one finding.

Bounded: beyond `found_max` what is new is left out, and counted. Time is an argument, in seconds since the epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvatlas_common.findings.vocabulary import NOTED, Code, Finding

About = str
"""An engine's id, an indexer's address, a model's name; "" is the deployment as a whole."""


@dataclass(frozen=True, slots=True)
class Found:
    """A current finding. `since`: when it was first seen."""

    about: About
    finding: Finding
    since: float

    @property
    def key(self) -> tuple[Code, About]:
        return self.finding.code, self.about

    def as_json(self) -> dict[str, Any]:
        finding = self.finding
        return {
            "severity": finding.severity.word,
            "code": str(finding.code),
            "about": self.about,
            "wrong": finding.wrong,
            "cause": finding.cause,
            "change": finding.change,
            "since": round(self.since, 3),
        }

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> Found:
        """Raises `ValueError`, `KeyError` or `TypeError` for what `as_json` has not made."""
        finding = Finding(Code(said["code"]), str(said["wrong"]), str(said["cause"]), str(said["change"]))
        return cls(str(said["about"]), finding, float(said["since"]))


@dataclass(frozen=True, slots=True)
class Changes:
    """What a look has brought, and what it no longer shows."""

    appeared: tuple[Found, ...] = ()
    cleared: tuple[Found, ...] = ()


class Board:
    def __init__(self, *, noted_s: float = 60.0, found_max: int = 4096) -> None:
        self.left_out = 0
        self._noted_s = noted_s
        self._found_max = found_max
        self._held: dict[tuple[Code, About], Found] = {}
        self._noted: dict[tuple[Code, About], tuple[Found, float]] = {}  # and when it last happened

    def hold(self, found: Iterable[tuple[About, Finding]], now: float) -> Changes:
        """All that a look shows. What was held before and is not among it is cleared."""
        before, self._held = self._held, {}
        appeared: list[Found] = []
        for about, finding in found:
            key = (finding.code, about)
            known = before.get(key)
            if key in self._held:
                continue
            if known is None and len(self._held) + len(self._noted) >= self._found_max:
                self.left_out += 1
                continue
            self._held[key] = replace(known, finding=finding) if known else Found(about, finding, now)
            if known is None:
                appeared.append(self._held[key])
        self._expire(now)
        cleared = (one for key, one in before.items() if key not in self._held)
        return Changes(tuple(appeared), tuple(cleared))

    def note(self, about: About, finding: Finding, now: float) -> None:
        """Something has happened; what only passes is not kept."""
        if finding.code not in NOTED:
            return
        key = (finding.code, about)
        known = self._noted.get(key)
        if known is None and len(self._held) + len(self._noted) >= self._found_max:
            self.left_out += 1
            return
        found = replace(known[0], finding=finding) if known else Found(about, finding, now)
        self._noted[key] = (found, now)

    def current(self, now: float) -> tuple[Found, ...]:
        """The worst first, then by code and name."""
        self._expire(now)
        merged = {key: found for key, (found, _) in self._noted.items()} | self._held
        return tuple(sorted(merged.values(), key=lambda found: (found.finding.severity, *found.key)))

    def counts(self, now: float) -> Counter[Code]:
        """How many things (engines, mostly) each code is about."""
        return Counter(found.finding.code for found in self.current(now))

    def _expire(self, now: float) -> None:
        self._noted = {key: noted for key, noted in self._noted.items() if now - noted[1] <= self._noted_s}
