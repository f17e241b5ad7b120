"""What a stream keeps while it is not whole: messages held back, and when to try again; and the limits of both."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_indexer.core.effects import Message


@dataclass(frozen=True, slots=True)
class Limits:
    held_back_max: int = 4096  # messages held back while a replay runs
    held_back_bytes_max: int = 64 << 20
    replay_stall_s: float = 5.0  # a replay that brings nothing for so long has failed
    replay_attempts: int = 3
    replay_retry_s: float = 0.5  # doubled with each attempt
    rebuild_interval_s: float = 30.0  # until a stream that lost something replays from 0; doubled with each attempt
    rebuild_interval_max_s: float = 900.0
    digests_kept: int = 1024  # of the latest applied messages, to tell a duplicate from a restart


class HeldBack:
    """In the order they came, all of one life of the engine as far as can be told."""

    def __init__(self, limits: Limits) -> None:
        self.top: Message | None = None  # the one with the highest number
        self._limits = limits
        self._messages: list[Message] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: Message) -> bool:
        """False when there are now more than fit."""
        self._messages.append(message)
        self._bytes += message.size
        if self.top is None or message.seq > self.top.seq:
            self.top = message
        return len(self._messages) <= self._limits.held_back_max and self._bytes <= self._limits.held_back_bytes_max

    def keep_since(self, ts: float) -> None:
        """Only those published then or later are still of use."""
        for message in [m for m in self.take() if m.ts >= ts]:
            self.add(message)

    def take(self) -> list[Message]:
        """All of them, by their numbers; nothing is held back any more."""
        messages, self._messages, self._bytes, self.top = self._messages, [], 0, None
        return sorted(messages, key=lambda message: message.seq)


class Retry:
    """When a stream that lost something tries to make up for it; less often each time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._at: float | None = None
        self._times = 0

    def plan(self, now: float) -> None:
        if self._at is None:
            delay = self._limits.rebuild_interval_s * 2.0**self._times
            self._at = now + min(delay, self._limits.rebuild_interval_max_s)
            self._times = min(self._times + 1, 16)

    def is_due(self, now: float) -> bool:
        """Once for each time it was planned."""
        if self._at is None or now < self._at:
            return False
        self._at = None
        return True

    def call_off(self) -> None:
        self._at = None

    def succeeded(self) -> None:
        self._times = max(0, self._times - 1)
