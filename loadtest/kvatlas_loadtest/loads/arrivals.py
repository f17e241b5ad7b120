"""A load as a list of arrivals: what is asked when, whoever is asked and in whatever time.

A prompt is a row of parts. A *segment* is named, not written out: the same seed is the same text, whoever renders it
(the simulator makes block names of it, the client on the wire words), and a shorter segment of a seed is the beginning
of a longer one. A multi-turn prompt holds the *answer* to an earlier arrival, which is known once that has been
answered: such an arrival names it as `after` and is sent `think_s` later, not before `at_s` (closed loop). All other
arrivals are sent at `at_s`, come what may (open loop).

A load may have *stages*, as load generators do that measure a ladder of rates: a stage begins when everything of the
stage before has been answered (or has failed), and `at_s` counts from there. Most loads are one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Segment:
    """`tokens` tokens of the text that `seed` stands for."""

    seed: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """All output tokens of the arrival with index `of`."""

    of: int


Part: TypeAlias = Segment | Answer


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `at_s` from the start of its stage. `salt` keeps caches apart: nothing is shared across salts."""

    at_s: float
    prompt: tuple[Part, ...]
    output_tokens: int
    session: str | None = None
    salt: str | None = None
    after: int | None = None
    think_s: float = 0.0
    stage: int = 0  # never lower than that of the arrival before


class BadLoad(ValueError):
    """Arrivals that cannot be sent: a reference forward, or a prompt without tokens."""


def prompt_tokens(arrivals: Sequence[Arrival], index: int) -> int:
    """Length of the prompt of one arrival, answers to earlier ones at their full length."""
    return sum(p.tokens if isinstance(p, Segment) else arrivals[p.of].output_tokens for p in arrivals[index].prompt)


def flattened(arrivals: Sequence[Arrival], index: int) -> Iterator[tuple[str, int, int]]:
    """The prompt as (`segment` or `answer`, seed or index, tokens): what names a prompt's blocks."""
    for part in arrivals[index].prompt:
        if isinstance(part, Segment):
            yield "segment", part.seed, part.tokens
        else:
            yield "answer", part.of, arrivals[part.of].output_tokens


def checked(arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
    """The same, if all of it can be sent. Raises `BadLoad`."""
    for index, arrival in enumerate(arrivals):
        answers = [part.of for part in arrival.prompt if isinstance(part, Answer)]
        if arrival.after is not None:
            answers.append(arrival.after)
        if any(not 0 <= of < index for of in answers):
            raise BadLoad(f"arrival {index} refers to {max(answers)}, which is not an earlier one")
        if any(isinstance(part, Answer) for part in arrival.prompt) and arrival.after is None:
            raise BadLoad(f"arrival {index} holds an answer, and says not after which arrival it is sent")
        if arrival.after is not None and arrivals[arrival.after].stage != arrival.stage:
            raise BadLoad(f"arrival {index} follows {arrival.after}, which is of another stage")
        if index and arrival.stage < arrivals[index - 1].stage:
            raise BadLoad(f"arrival {index} is of stage {arrival.stage}, the one before of a later stage")
        if arrival.output_tokens < 1 or prompt_tokens(arrivals, index) < 1:
            raise BadLoad(f"arrival {index} has no prompt or asks for no output")
    return arrivals
