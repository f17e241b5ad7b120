"""What the clients of the acceptance say: conversations that go on, single prompts, prompts said again. Pure.

A workload is drawn from a seeded generator, so a run can be had again. Requests come in waves: most of one request,
some of several at once, as real clients do; which of two requests of a wave an engine begins with is its own affair, so
their cached tokens cannot be foretold exactly, and the comparison sets them apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WAVE_EVERY = 12  # every so many waves is one of several requests
WAVE_SIZE = 3
CONVERSATION_CHARS_MAX = 6000  # far below the engines' 4,096 tokens, whatever the words are
OPEN_CONVERSATIONS_MAX = 12
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up – in any language",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
UNICODE = ("naïve", "größer", "東京タワー", "данные", "🙂👩‍👩‍👧", "e\u0301te\u0301", "ไทย", "\u00a0…", "ﬁn", "𝒳")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `conversation` names what it belongs to, `turn` counts from 0; `alone`: no other of its wave."""

    number: int
    path: str
    body: dict[str, Any]
    streamed: bool
    kind: str
    conversation: int | None = None
    turn: int = 0
    alone: bool = True


@dataclass(slots=True)
class _Conversation:
    number: int
    path: str
    kind: str
    fields: dict[str, Any]  # what every request of it holds besides the prompt
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    turns: int = 0

    def chars(self) -> int:
        return len(self.text) + sum(len(str(m["content"])) for m in self.messages)


class Workload:
    """`vocabulary`: the words prompts are made of. `vocabulary_size`: token ids given as prompts are below it."""

    def __init__(
        self, rng: random.Random, vocabulary: Sequence[str], *, requests: int, model: str, vocabulary_size: int = 7000
    ) -> None:
        self._rng = rng
        self._vocabulary = [*vocabulary, *UNICODE]
        self._model = model
        self._token_ids_below = vocabulary_size
        self._left = requests
        self._asked = 0
        self._waves = 0
        self._systems = [self._words(90, 220) for _ in range(5)]
        self._token_prefixes = [self._token_ids(150, 400) for _ in range(2)]
        self._open: list[_Conversation] = []
        self._conversations = 0
        self._said: list[Ask] = []

    def wave(self) -> list[Ask]:
        """The next requests, to be sent at once; empty when all have been."""
        self._waves += 1
        size = min(self._left, WAVE_SIZE if self._waves % WAVE_EVERY == 0 else 1)
        busy: set[int] = set()
        asks = [self._ask(busy, alone=size == 1) for _ in range(size)]
        self._left -= size
        return asks

    def answered(self, ask: Ask, text: str) -> None:
        """The conversation goes on from this answer."""
        for conversation in self._open:
            if conversation.number == ask.conversation:
                if ask.path == CHAT:
                    conversation.messages.append({"role": "assistant", "content": text})
                else:
                    conversation.text += text
                conversation.turns += 1
                if conversation.chars() > CONVERSATION_CHARS_MAX:
                    self._open.remove(conversation)
                return

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _ask(self, busy: set[int], *, alone: bool) -> Ask:
        may_go_on = [c for c in self._open if c.turns and c.number not in busy]
        drawn = self._rng.random()
        if may_go_on and drawn < 0.55:
            ask = self._follow_up(self._rng.choice(may_go_on), alone=alone)
        elif self._said and drawn < 0.60:
            said = self._rng.choice(self._said)
            ask = self._make(said.path, {**said.body}, "said again", streamed=said.streamed, alone=alone)
        elif drawn < 0.80:
            ask = self._follow_up(self._begin(), alone=alone)
        else:
            ask = self._single(alone=alone)
        if ask.conversation is not None:
            busy.add(ask.conversation)
        self._said = [*self._said[-30:], ask]
        return ask

    def _begin(self) -> _Conversation:
        kind = self._rng.choice(["chat", "chat", "chat", "parts", "tools", "salted", "keywords", "text"])
        fields: dict[str, Any] = {}
        if kind == "salted":
            fields["cache_salt"] = self._rng.choice(["tenant-a", "mandant-ü"])
        elif kind == "tools":
            fields |= {"tools": [TOOL], "tool_choice": "none"}
        elif kind == "keywords":
            fields["chat_template_kwargs"] = {"mood": self._rng.choice(["calm", "wild"])}
        conversation = _Conversation(self._conversations, COMPLETIONS if kind == "text" else CHAT, kind, fields)
        self._conversations += 1
        system = self._rng.choice(self._systems)
        if conversation.path == CHAT:
            conversation.messages.append({"role": "system", "content": system})
        else:
            conversation.text = system + "\n"
        self._open = [*self._open[-(OPEN_CONVERSATIONS_MAX - 1) :], conversation]
        return conversation

    def _follow_up(self, conversation: _Conversation, *, alone: bool) -> Ask:
        said = self._words(15, 70)
        body = dict(conversation.fields)
        if conversation.path == CHAT:
            content: Any = said
            if conversation.kind == "parts":
                content = [{"type": "text", "text": said}, {"type": "text", "text": self._words(3, 12)}]
            conversation.messages.append({"role": "user", "content": content})
            body["messages"] = list(conversation.messages)
        else:
            conversation.text += said
            body["prompt"] = conversation.text
        streamed = self._rng.random() < 0.5
        return self._make(
            conversation.path, body, conversation.kind, streamed=streamed, alone=alone, conversation=conversation
        )

    def _single(self, *, alone: bool) -> Ask:
        kind = self._rng.choice(["prompt", "one of a list", "token ids", "token ids in a list", "salted prompt"])
        body: dict[str, Any] = {}
        if kind.startswith("token ids"):
            tokens = self._rng.choice(self._token_prefixes) + self._token_ids(5, 120)
            body["prompt"] = [tokens] if kind.endswith("list") else tokens
        else:
            text = f"{self._rng.choice(self._systems)} {self._words(15, 70)}"
            body["prompt"] = [text] if kind == "one of a list" else text
        if kind == "salted prompt":
            body["cache_salt"] = "tenant-a"
        return self._make(COMPLETIONS, body, kind, streamed=self._rng.random() < 0.5, alone=alone)

    def _make(
        self,
        path: str,
        body: dict[str, Any],
        kind: str,
        *,
        streamed: bool,
        alone: bool,
        conversation: _Conversation | None = None,
    ) -> Ask:
        body = {"model": self._model, "max_tokens": self._rng.randint(4, 40), "temperature": 0, **body}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        number, self._asked = self._asked, self._asked + 1
        if conversation is None:
            return Ask(number, path, body, streamed, kind, alone=alone)
        return Ask(number, path, body, streamed, kind, conversation.number, conversation.turns, alone)

    def _words(self, least: int, most: int) -> str:
        return " ".join(self._rng.choices(self._vocabulary, k=self._rng.randint(least, most)))

    def _token_ids(self, least: int, most: int) -> list[int]:
        return [self._rng.randrange(10, self._token_ids_below) for _ in range(self._rng.randint(least, most))]
