"""What is asked of the forwarder, and what it tells of how that went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from kvatlas_common.observations import Outcome
from kvatlas_router.adapters.asgi import Headers, Request
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.choice import Choice, Term
from kvatlas_router.core.usage import NO_USAGE, Usage


class Listener(Protocol):
    """Who is told how a request fares."""

    def sending(self, term: Term) -> None:
        """An engine is tried; nothing was sent to it. What the request says may still be changed."""
        ...

    def sent(self, term: Term) -> None:
        """The engine has the request, or will when its connection takes it. Not told where there is no connection."""
        ...

    def retried(self, why: str) -> None: ...

    def first_byte(self, term: Term) -> None:
        """The client has been sent the first of the body."""
        ...


@dataclass(slots=True)
class Forwarded:
    """What became of a request. `term`: the engine that answered, or was tried last."""

    term: Term | None = None
    status: int = 0
    outcome: Outcome = Outcome.ERROR
    attempts: int = 0
    bytes_out: int = 0
    usage: Usage = NO_USAGE
    response: str | None = None  # id of a stored response
    error: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One request and what forwarding it needs to know. `pinned`: addresses that serve several ranks."""

    request: Request
    body: bytes
    ask: Ask
    choice: Choice
    response_headers: Callable[[Term], Headers]
    listener: Listener
    _: KW_ONLY
    pinned: frozenset[str] = frozenset()
    drop_usage_chunk: bool = False
