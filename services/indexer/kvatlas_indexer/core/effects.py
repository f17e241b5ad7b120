"""What a stream takes in and what it asks for: values, performed by whoever owns the index and the network."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import msgspec

from kvatlas_common.events.types import EventBatch


class Message(msgspec.Struct, frozen=True):
    """One decoded message of an engine. `digest` tells its bytes from others; `size` in bytes."""

    seq: int
    digest: int
    size: int
    batch: EventBatch

    @property
    def ts(self) -> float:
        return self.batch.ts


class ReplayEnd(StrEnum):
    """How a replay ended."""

    COMPLETE = "complete"  # the end marker was seen
    REFUSED = "refused"  # nobody answered
    TRUNCATED = "truncated"  # it stopped before the end marker


class Apply(msgspec.Struct, frozen=True):
    message: Message


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """The engine's cache began anew: forget everything it held."""

    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Messages were lost: what is known so far stays usable but is doubtful."""

    reason: str


@dataclass(frozen=True, slots=True)
class BuildAgain:
    """Everything follows from message 0 on: what is known so far is set aside, doubtful, until that is through."""


@dataclass(frozen=True, slots=True)
class DropDoubtful:
    """Everything still held has been confirmed since: forget what has not."""


@dataclass(frozen=True, slots=True)
class RequestReplay:
    first_seq: int
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CancelReplay:
    pass


@dataclass(frozen=True, slots=True)
class Duplicate:
    seq: int


Effect: TypeAlias = Apply | BeginEpoch | Doubt | BuildAgain | DropDoubtful | RequestReplay | CancelReplay | Duplicate
