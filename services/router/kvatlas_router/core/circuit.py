"""When to stop asking an indexer that does not answer.

`OPEN_AFTER` failures in a row open the circuit: requests stop waiting for this indexer. After a pause, one lookup is
let through as a trial; a success closes the circuit, a failure doubles the pause, up to a limit.
"""

from __future__ import annotations

OPEN_AFTER = 3
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 2.0


class Circuit:
    """Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._quiet_until: float | None = None

    def allows(self, now: float) -> bool:
        """Whether to ask now. While the circuit is open a True is a trial, and the next one a pause later."""
        if self._failures < OPEN_AFTER:
            return True
        if self._quiet_until is not None and now < self._quiet_until:
            return False
        self._quiet_until = now + self._pause_s
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._quiet_until = None

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._failures == OPEN_AFTER:
            self._quiet_until = now + self._pause_s
        elif self._failures > OPEN_AFTER:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
            self._quiet_until = now + self._pause_s
