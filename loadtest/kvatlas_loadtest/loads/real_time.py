"""The arrivals of a load sent to a server over sockets, in real time, and what became of them.

An arrival is due at its time whether or not others have been answered (open loop), counted from the start of the load,
so that lateness never adds up; a turn of a conversation is due when the turn before it has been answered and thought
about (closed loop), and carries the text that was really answered. Times count from when a request was due, not from
when a busy client came round to sending it: what a user waits, and how late the client was, is told apart. At most
`connections_max` requests are under way; above that they wait in the client, and are late. A stage begins when all of
the stage before has ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import aiohttp

from kvatlas_loadtest.client import ENGINE_HEADER, Answer, ask
from kvatlas_loadtest.loads.arrivals import Answer as AnswerTo
from kvatlas_loadtest.loads.arrivals import Arrival
from kvatlas_loadtest.loads.outcomes import Outcome
from kvatlas_loadtest.loads.rendering import Rendering

TIMEOUT_S = 600.0
CONNECTIONS_MAX = 1024
NOT_SENT = "not sent: the turn before it failed"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes. `url` without a path. `session_header` carries an arrival's session, where it has one."""

    url: str
    rendering: Rendering
    headers: Mapping[str, str] = field(default_factory=dict)
    engine_header: str = ENGINE_HEADER
    session_header: str = "x-session-id"
    timeout_s: float = TIMEOUT_S
    connections_max: int = CONNECTIONS_MAX


class Player:
    """Plays a load once. What is known so far can be read at any time, also after `play` was cancelled.

    `gaps_s`: between pieces of streams, of all answers. `late_max_s`: the latest a request was sent after it was due.
    """

    def __init__(self, target: Target, arrivals: Sequence[Arrival], answered: Callable[[Outcome], None] | None = None):
        self.outcomes: list[Outcome] = []
        self.gaps_s: list[float] = []
        self.late_max_s = 0.0
        self._target = target
        self._arrivals = arrivals
        self._answered = answered or (lambda outcome: None)
        self._room = asyncio.Semaphore(target.connections_max)
        self._texts: dict[int, str] = {}
        self._wanted = Counter(part.of for a in arrivals for part in a.prompt if isinstance(part, AnswerTo))
        self._followers: dict[int, list[int]] = {}
        for index, arrival in enumerate(arrivals):
            if arrival.after is not None:
                self._followers.setdefault(arrival.after, []).append(index)
        self._begun = self._stage_begun = 0.0

    async def play(self) -> None:
        """Sends everything and waits for every answer. Cancelling it drops what is under way."""
        timeout = aiohttp.ClientTimeout(total=self._target.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._begun = asyncio.get_running_loop().time()
            for _, stage in groupby(range(len(self._arrivals)), key=lambda i: self._arrivals[i].stage):
                self._stage_begun = self._now()
                await self._stage(session, [i for i in stage if self._arrivals[i].after is None])

    async def _stage(self, session: aiohttp.ClientSession, open_loop: list[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for index in sorted(open_loop, key=lambda i: self._arrivals[i].at_s):
                due_s = self._stage_begun + self._arrivals[index].at_s
                await self._until(due_s)
                group.create_task(self._conversation(group, session, index, due_s))

    async def _conversation(
        self, group: asyncio.TaskGroup, session: aiohttp.ClientSession, index: int, due_s: float
    ) -> None:
        """One arrival, then those that come after it."""
        await self._until(due_s)
        outcome = await self._one(session, index, due_s)
        self._note(outcome)
        for follower in self._followers.get(index, ()):
            arrival = self._arrivals[follower]
            if outcome.error:
                self._not_sent(follower)
                continue
            due_s = max(self._stage_begun + arrival.at_s, self._now() + arrival.think_s)
            group.create_task(self._conversation(group, session, follower, due_s))

    async def _one(self, session: aiohttp.ClientSession, index: int, due_s: float) -> Outcome:
        arrival, target = self._arrivals[index], self._target
        async with self._room:
            body = target.rendering.body(arrival, self._texts)
            self._forget_texts(arrival)
            headers = dict(target.headers)
            if arrival.session is not None:
                headers[target.session_header] = arrival.session
            sent_s = self._now()
            self.late_max_s = max(self.late_max_s, sent_s - due_s)
            answer = await ask(
                session,
                target.url,
                body,
                target.rendering.path,
                headers=headers,
                engine_header=target.engine_header,
            )
        if index in self._wanted:
            self._texts[index] = answer.text
        self.gaps_s += answer.gaps_s
        return _outcome(index, arrival.stage, answer, due_s, sent_s)

    def _forget_texts(self, arrival: Arrival) -> None:
        """An answer is kept until the last prompt that holds it has been written out."""
        for part in arrival.prompt:
            if isinstance(part, AnswerTo):
                self._wanted[part.of] -= 1
                if not self._wanted[part.of]:
                    self._texts.pop(part.of, None)

    def _not_sent(self, index: int) -> None:
        """The rest of a conversation that has come to an end."""
        arrival = self._arrivals[index]
        self._forget_texts(arrival)
        self._note(Outcome(index, self._now(), None, None, None, 0, 0, 0, NOT_SENT, stage=arrival.stage))
        for follower in self._followers.get(index, ()):
            self._not_sent(follower)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._answered(outcome)

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - self._now(), 0.0))

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._begun


def _outcome(index: int, stage: int, answer: Answer, due_s: float, sent_s: float) -> Outcome:
    return Outcome(
        arrival=index,
        sent_s=due_s,
        first_token_s=None if answer.ttft_s is None else sent_s + answer.ttft_s,
        finished_s=sent_s + answer.total_s,
        engine=answer.engine or None,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        output_tokens=answer.output_tokens or len(answer.gaps_s) + (answer.ttft_s is not None),
        error=answer.error,
        reason=answer.reason,
        stage=stage,
    )
