"""One completion request inside a simulated engine: its sequences, and the pieces of text they turn into."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from kvatlas_loadtest.openai_requests import StopText, Wanted
from kvatlas_loadtest.openai_shapes import Choice, Usage
from kvatlas_loadtest.rank import EngineRank, Mailbox
from kvatlas_loadtest.scheduler import EngineRequest
from kvatlas_loadtest.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to a choice; `text` may be empty (held back, or the token that ends)."""

    choice: Choice
    text: str
    token_ids: Sequence[int]


@dataclass(slots=True)
class _Sequence:
    choice: Choice
    stop: StopText


@dataclass(slots=True)
class Generation:
    """`choices` in the order of their indexes; complete once `pieces` has ended."""

    rank: EngineRank
    vocabulary: Vocabulary
    prompts: Sequence[Sequence[int]]
    _mailbox: Mailbox = field(default_factory=Mailbox, init=False)
    _open: dict[EngineRequest, _Sequence] = field(default_factory=dict, init=False)
    _started: list[EngineRequest] = field(default_factory=list, init=False)
    choices: list[Choice] = field(default_factory=list, init=False)

    def start(self, request: EngineRequest, wanted: Wanted) -> None:
        """Submits one sequence. Raises what `EngineRank.submit` raises; then nothing of this generation goes on."""
        choice = Choice(len(self.choices), prompt_token_ids=request.prompt)
        try:
            self.rank.submit(request, self._mailbox)
        except Exception:
            self.abort()
            raise
        self._open[request] = _Sequence(choice, StopText(wanted.stop))
        self._started.append(request)
        self.choices.append(choice)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """All that is there, as soon as something is: a slow reader gets more at once."""
        while self._open:
            pieces = [
                self._piece(request, token_id, reason)
                for request, token_id, reason in await self._mailbox.take()
                if request in self._open
            ]
            if pieces:
                yield pieces

    def abort(self) -> None:
        """Ends the sequences that have not ended."""
        for request in self._open:
            self.rank.abort(request)
        self._open.clear()

    def usage(self) -> Usage:
        """So far; a prompt counts once, however many choices it has."""
        completion = sum(len(choice.token_ids) for choice in self.choices)
        cached = self._started[-1].cached_tokens or 0
        return Usage(sum(map(len, self.prompts)), completion, cached)

    def _piece(self, request: EngineRequest, token_id: int, reason: str | None) -> Piece:
        sequence = self._open[request]
        choice = sequence.choice
        choice.token_ids.append(token_id)
        text, met = sequence.stop.push(self.vocabulary.text_of.get(token_id, ""), reason is not None)
        if met is not None:
            self.rank.abort(request)
            reason, choice.stop_reason = "stop", met
        choice.text += text
        if reason is not None:
            choice.finish_reason = reason
            del self._open[request]
        return Piece(choice, text, (token_id,))
