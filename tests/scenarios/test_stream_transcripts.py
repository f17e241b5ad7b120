"""The state machine of `core/stream.py`, pinned by transcripts that read like a conversation.

A line that is not indented is something that happens to a stream; the indented lines below are what it answers: its
effects, and after `=` its state where that has changed. `a4` is message 4 of the engine's life `a`, `b0` message 0 of
its next life; each message has other bytes and a later time than those before it, and life `a` began at second 100,
`b` at second 200, and so on. `pytest --rewrite tests/scenarios` writes the answers anew.

| line                            | what happens                                                          |
|---------------------------------|-----------------------------------------------------------------------|
| `stream [no-replay] [limit=n]`  | a new stream, at second 0 of the indexer's clock                      |
| `message a4 [clear] [ts=n]`     | a live message; `clear`: everything is cleared in it                  |
| `replayed a4 [clear] [ts=n]`    | a message of the replay under way                                     |
| `replay complete`               | the replay has ended, so or `refused` or `truncated`                  |
| `tick +n`                       | n seconds have passed                                                 |
| `unusable <why>`                | an event of the last message applied could not be used                |
| `attached`, `returned`          | the engine has become known, or is back after being out of reach      |
| `process-start n`               | its `process_start_time_seconds`                                      |
| `can-replay yes`                | its replay endpoint has become known (`no`: is known no longer)       |
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas_common.events.types import AllBlocksCleared, EventBatch
from kvatlas_indexer.core.effects import (
    Apply,
    BeginEpoch,
    BuildAgain,
    CancelReplay,
    Doubt,
    DropDoubtful,
    Duplicate,
    Effect,
    Message,
    ReplayEnd,
    RequestReplay,
)
from kvatlas_indexer.core.stream import Limits, Stream

TRANSCRIPTS = sorted(Path(__file__).parent.glob("*.txt"))
LIVES = "abcdef"


class Talk:
    """One stream, told lines and answering lines."""

    def __init__(self) -> None:
        self._stream = Stream(can_replay=True)
        self._now = 0.0
        self._state = ""

    def say(self, line: str) -> list[str]:
        what, *words = line.split()
        if what == "stream":
            self._new(words)
            effects: list[Effect] = []
        else:
            effects = self._happens(what, words)
        state = self._describe()
        changed, self._state = state != self._state, state
        return [_written(effect) for effect in effects] + ([f"= {state}"] if changed else [])

    def _new(self, words: list[str]) -> None:
        limits = {name: float(value) for name, _, value in (word.partition("=") for word in words) if value}
        whole = {name: int(value) if name.endswith("_max") else value for name, value in limits.items()}
        self._stream = Stream(can_replay="no-replay" not in words, limits=Limits(**whole))  # type: ignore[arg-type]
        self._now, self._state = 0.0, ""

    def _happens(self, what: str, words: list[str]) -> list[Effect]:
        stream, now = self._stream, self._now
        match what, words:
            case "message", [name, *rest]:
                return stream.on_message(_message(name, rest), now)
            case "replayed", [name, *rest]:
                return stream.on_replayed(_message(name, rest), now)
            case "replay", [end]:
                return stream.on_replay_end(ReplayEnd(end), now)
            case "tick", [seconds]:
                self._now += float(seconds)
                return stream.on_tick(self._now)
            case "unusable", why:
                return stream.on_unusable(" ".join(why), now)
            case "attached", []:
                return stream.on_attached(now)
            case "returned", []:
                return stream.on_returned(now)
            case "process-start", [seconds]:
                return stream.on_process_start(float(seconds), now)
            case "can-replay", [answer]:
                stream.can_replay = answer == "yes"
                return []
        raise ValueError(f"{what} {words} is nothing a transcript knows")

    def _describe(self) -> str:
        stream = self._stream
        state = f"{stream.sync}, nothing applied" if stream.last is None else f"{stream.sync}, last {stream.last}"
        state += f", {stream.held_back} held back" if stream.held_back else ""
        return f"{state}: {stream.inexact_reason}" if stream.inexact_reason else state


def _message(name: str, words: list[str]) -> Message:
    life, seq = LIVES.index(name[0]), int(name[1:])
    ts = next((float(word[3:]) for word in words if word.startswith("ts=")), 100.0 * (life + 1) + seq)
    events = (AllBlocksCleared(),) if "clear" in words else ()
    return Message(seq, 1000 * life + seq, 100, EventBatch(ts, None, events))


def _name(message: Message) -> str:
    return f"{LIVES[message.digest // 1000]}{message.seq}"


def _written(effect: Effect) -> str:
    match effect:
        case Apply(message):
            return f"apply {_name(message)}"
        case BeginEpoch(reason):
            return f"begin epoch: {reason}"
        case Doubt(reason):
            return f"doubt: {reason}"
        case BuildAgain():
            return "build again"
        case DropDoubtful():
            return "drop doubtful"
        case RequestReplay(first, delay):
            return f"request replay from {first}" + (f" in {delay:g} s" if delay else "")
        case CancelReplay():
            return "cancel replay"
        case Duplicate(seq):
            return f"duplicate {seq}"


def played(text: str) -> str:
    """The transcript as it is answered now."""
    talk, lines = Talk(), list[str]()
    for line in text.splitlines():
        if line.startswith("  "):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines += [f"  {answer}" for answer in talk.say(line)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=[path.stem for path in TRANSCRIPTS])
def test_transcript(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text()
    answered = played(written)
    if request.config.getoption("--rewrite"):
        path.write_text(answered)
    else:
        assert answered == written


def test_every_row_of_the_table_has_a_transcript() -> None:
    said = "".join(path.read_text() for path in TRANSCRIPTS)
    for effect in ("apply", "begin epoch", "doubt", "build again", "drop doubtful", "request", "cancel", "duplicate"):
        assert f"\n  {effect} " in said or f"\n  {effect}:" in said or f"\n  {effect}\n" in said
    assert len(TRANSCRIPTS) >= 12
