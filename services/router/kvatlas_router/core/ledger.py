"""What this router has sent where and not yet seen answered.

A request's prompt tokens count as queued at its engine until the first byte of the answer, and the request as in
flight until its end. A `Ticket` is a context manager, so whatever ends a request (an error, a disconnect, a retry on
another engine) takes it off the books once. Engines leave the books when they leave the fleet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType

from kvatlas_common.words import EngineId


@dataclass(slots=True)
class _Account:
    queued_tokens: int = 0
    in_flight: int = 0
    unanswered: int = 0
    last_used: float = float("-inf")


class Ledger:
    """The books of all engines. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._accounts: dict[EngineId, _Account] = {}

    def enter(self, engine: EngineId, tokens: int, now: float) -> Ticket:
        account = self._accounts.setdefault(engine, _Account())
        account.queued_tokens += tokens
        account.in_flight += 1
        account.unanswered += 1
        account.last_used = now
        return Ticket(account, tokens)

    def queued_tokens(self, engine: EngineId) -> int:
        return self._accounts[engine].queued_tokens if engine in self._accounts else 0

    def in_flight(self, engine: EngineId) -> int:
        return self._accounts[engine].in_flight if engine in self._accounts else 0

    def unanswered(self, engine: EngineId) -> int:
        """Requests in flight of whose answer nothing has come yet."""
        return self._accounts[engine].unanswered if engine in self._accounts else 0

    def last_used(self, engine: EngineId) -> float:
        return self._accounts[engine].last_used if engine in self._accounts else float("-inf")

    def keep_only(self, engines: Collection[EngineId]) -> None:
        """Forget engines that left, unless requests are still in flight there."""
        gone = [e for e, a in self._accounts.items() if e not in engines and not a.in_flight]
        for engine in gone:
            del self._accounts[engine]

    def __len__(self) -> int:
        return len(self._accounts)


class Ticket:
    """One request at one engine."""

    __slots__ = ("_account", "_open", "_started", "_tokens")

    def __init__(self, account: _Account, tokens: int) -> None:
        self._account = account
        self._tokens = tokens
        self._open = True
        self._started = False

    def started(self) -> None:
        """The first byte came: its prompt is computed."""
        if not self._started:
            self._started = True
            self._account.unanswered -= 1
        self._account.queued_tokens -= self._tokens
        self._tokens = 0

    def close(self) -> None:
        if self._open:
            self._open = False
            self.started()
            self._account.in_flight -= 1

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
