"""Doing something soon: once for all that asked meanwhile, at once where it was not done lately."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Soon:
    """Calls `act` in the running event loop, at most once in `gap_s` seconds."""

    def __init__(self, act: Callable[[], None], gap_s: float) -> None:
        self._act = act
        self._gap_s = gap_s
        self._last = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def within(self, delay_s: float) -> None:
        """Not later than in `delay_s` seconds, or than the gap allows."""
        if self._stopped:
            return
        loop = asyncio.get_running_loop()
        due = max(loop.time() + delay_s, self._last + self._gap_s)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._do)

    def stop(self) -> None:
        """It is not done any more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _do(self) -> None:
        self._timer = None
        self._last = asyncio.get_running_loop().time()
        self._act()
