"""What this router has sent where and not yet seen answered.

A request is *pending* until its first token and *decoding* until its end. A `Ticket` is a context manager, so whatever
ends a request (an error, a disconnect, a retry on another engine) takes it off the books once. Engines leave the books
when they leave the fleet.

Of an engine's pending prompts the oldest, the *head*, is being computed: it has got as far as the engine's rate and the
time since it became the oldest allow. An answer that does not stream shows its first token with its last, so such a
request counts as decoding once the time its prompt was expected to take has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from kvatlas_common.words import EngineId

NEVER = float("-inf")


class Occupancy(NamedTuple):
    """One engine's books at a moment. `late_s`: how much longer its oldest pending request takes than expected.

    A tuple: every choice makes one per engine.
    """

    pending: int = 0
    queued_tokens: int = 0  # of the pending prompts, to be computed
    decoding: int = 0
    late_s: float = 0.0
    last_used: float = NEVER
    head_tokens: int = 0  # of these, those of the oldest
    head_since: float | None = None  # since when it is the oldest, if that is known

    @property
    def in_flight(self) -> int:
        return self.pending + self.decoding


EMPTY = Occupancy()


@dataclass(slots=True)
class Account:
    """One engine. `head_since`: since when its oldest pending prompt has been the oldest."""

    pending: dict[Ticket, None] = field(default_factory=dict)
    queued_tokens: int = 0
    decoding: int = 0
    last_used: float = NEVER
    head_since: float | None = None  # None: not known

    def leave(self, ticket: Ticket, now: float | None) -> None:
        """It is pending no more; the next one is the oldest from `now` on, if that is known."""
        oldest = next(iter(self.pending)) is ticket
        del self.pending[ticket]
        self.queued_tokens -= ticket.tokens
        if oldest:
            self.head_since = now


class Books:
    """The books of all engines. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._accounts: dict[EngineId, Account] = {}

    def enter(
        self,
        engine: EngineId,
        tokens: int,
        now: float,
        *,
        expected_s: float = 0.0,
        streams: bool = True,
        on_end: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """`tokens` it is to compute; `expected_s`: to its first token. `on_end` is called once, when it is closed."""
        account = self._accounts.setdefault(engine, Account())
        ticket = Ticket(account, tokens, now, expected_s=expected_s, streams=streams, on_end=on_end)
        if not account.pending:
            account.head_since = now
        account.pending[ticket] = None
        account.queued_tokens += tokens
        account.last_used = now
        return ticket

    def of(self, engine: EngineId, now: float) -> Occupancy:
        account = self._accounts.get(engine)
        if account is None:
            return EMPTY
        if account.pending:
            self._move_silent(account, now)
        if not account.pending:
            return Occupancy(0, 0, account.decoding, 0.0, account.last_used)
        head = next(iter(account.pending))
        late_s = max(now - head.sent_at - head.expected_s, 0.0) if head.expected_s else 0.0
        return Occupancy(
            len(account.pending),
            account.queued_tokens,
            account.decoding,
            late_s,
            account.last_used,
            head.tokens,
            account.head_since,
        )

    def keep_only(self, engines: Collection[EngineId]) -> None:
        """Forget engines that left, unless requests are still in flight there."""
        gone = [e for e, a in self._accounts.items() if e not in engines and not (a.pending or a.decoding)]
        for engine in gone:
            del self._accounts[engine]

    def __len__(self) -> int:
        return len(self._accounts)

    def _move_silent(self, account: Account, now: float) -> None:
        while account.pending:
            head = next(iter(account.pending))
            if head.streams or not head.expected_s or now - head.sent_at < head.expected_s:
                return
            head.computed(now)


class Ticket:
    """One request at one engine. `first_token_s`: from sending it to its first token; None until that is seen."""

    __slots__ = (
        "_account",
        "_decoding",
        "_on_end",
        "_open",
        "cached_tokens",
        "completion_tokens",
        "ended_at",
        "expected_s",
        "first_token_s",
        "sent_at",
        "streams",
        "tokens",
    )

    def __init__(
        self,
        account: Account,
        tokens: int,
        now: float,
        *,
        expected_s: float,
        streams: bool,
        on_end: Callable[[Ticket], None] | None,
    ) -> None:
        self.tokens = tokens
        self.sent_at = now
        self.expected_s = expected_s
        self.streams = streams
        self.first_token_s: float | None = None
        self.ended_at: float | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self._account = account
        self._on_end = on_end
        self._open = True
        self._decoding = False

    def started(self, now: float) -> None:
        """The first byte came."""
        if self.streams and self.first_token_s is None:
            self.first_token_s = now - self.sent_at
        self.computed(now)

    def computed(self, now: float) -> None:
        """Its prompt is computed, as far as can be told."""
        account = self._account
        if self not in account.pending:
            return
        account.leave(self, now)
        account.decoding += 1
        self._decoding = True

    def ended(self, now: float, cached_tokens: int | None, completion_tokens: int | None) -> None:
        """Its answer came whole. Both as the engine reported them, None where it did not."""
        self.ended_at = now
        self.cached_tokens, self.completion_tokens = cached_tokens, completion_tokens

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self in self._account.pending:
            self._account.leave(self, None)
        if self._decoding:
            self._account.decoding -= 1
        if self._on_end is not None:
            self._on_end(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
