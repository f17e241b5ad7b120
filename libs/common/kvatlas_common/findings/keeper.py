"""The findings of one service: kept on its board, and logged when they appear, now and then while they last, and when
they clear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from kvatlas_common.findings.board import Board, Found
from kvatlas_common.findings.vocabulary import NOTED, PASSING, Code, Finding, Severity
from kvatlas_common.logs import LimitedLog

LOG_INTERVAL_S = 30.0
REMINDED_EVERY_S = 600.0
REMINDED_MAX = 32
"""What lasts is said again so often, and so much of it at once: the worst."""


class Findings:
    """`clock` is monotonic, `wall` gives seconds since the epoch."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._log = log
        self._wall = wall
        self._board = Board()
        self._limited = LimitedLog(log, LOG_INTERVAL_S, clock)
        self._clock = clock
        self._reminded_at = clock()

    def note(self, about: object, finding: Finding) -> None:
        """Something has happened. `about`: an engine, as a rule; None: nothing in particular.

        Where it leaves a state behind, the next look says so, and more.
        """
        if finding.code not in NOTED and finding.code not in PASSING:
            return
        name = "" if about is None else str(about)
        self._board.note(name, finding, self._wall())
        self._write(name, finding)

    def look(self, found: Iterable[tuple[object, Finding]]) -> None:
        """All that is wrong by the look of it, now."""
        changes = self._board.hold(((str(about), finding) for about, finding in found), self._wall())
        for one in changes.cleared:
            self._log.info("finding cleared", extra={"code": str(one.finding.code), "about": one.about})
        lasting = self._board.current(self._wall())[:REMINDED_MAX] if self._reminder_is_due() else ()
        for one in changes.appeared or lasting:
            self._write(one.about, one.finding)

    def current(self) -> tuple[Found, ...]:
        return self._board.current(self._wall())

    def counts(self) -> dict[Code, int]:
        """Of every code, so that a series is 0 before it is anything else."""
        return dict.fromkeys(Code, 0) | self._board.counts(self._wall())

    def _reminder_is_due(self) -> bool:
        now = self._clock()
        if now - self._reminded_at < REMINDED_EVERY_S:
            return False
        self._reminded_at = now
        return True

    def _write(self, about: str, finding: Finding) -> None:
        level = logging.INFO if finding.severity is Severity.ADVICE else logging.WARNING
        fields = {
            "severity": finding.severity.word,
            "engine": about or None,
            "why": finding.wrong,
            "cause": finding.cause or None,
            "change": finding.change or None,
        }
        self._limited.log(level, f"{finding.code} {about}", str(finding.code), fields)
