"""What is sent to the engine: requests from a file, or a varied workload that follows from a seed.

The workload has what tells a right index from a wrong one: conversations that grow by the engine's own answers, texts
that share a beginning and part in the middle of a block, the same under different salts and adapters, repetitions, and
streams.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvatlas_cli.record_answers import Answer, Request
from kvatlas_common.prompts.requests import CHAT, COMPLETIONS
from kvatlas_loadtest.texts import WORDS

CONVERSATIONS = 6  # alive at a time
SALTS = (None, None, None, "tenant-a", "tenant-b")
SHARE_OF_CONTEXT = 0.5  # a conversation longer than this share of the model's context is over

Source = Generator[Request, Answer, None]
"""Requests; `send` gives the answer to the last one."""


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """What the workload is cut to. `models`: served names; lengths in tokens."""

    models: Sequence[str]
    ranks: int = 1
    block_size: int = 64
    max_model_len: int = 4096


@dataclass(slots=True)
class _Conversation:
    model: str
    salt: str | None
    rank: int | None
    messages: list[dict[str, str]] = field(default_factory=list)


def from_file(path: Path, ranks: int) -> list[Request]:
    """Lines `{"path", "body", "data_parallel_rank"}`, such as a capture's own `requests.jsonl[.gz]`; `path` follows
    from the body where it is left out. Raises `ValueError` that names the line, `OSError`."""
    return [_parsed(f"{path}:{number}", line, ranks) for number, line in _lines(path)]


def generate(count: int, engine: EngineTraits, seed: int) -> Source:
    """`count` requests. Each prompt is some blocks long and well within the model's context."""
    chance = random.Random(seed)
    unit = max(min(engine.block_size, engine.max_model_len // 32), 8)  # words, one token each in common vocabularies
    contexts = [_words(chance, unit * blocks) for blocks in (2, 4, 3)]
    alive: list[_Conversation] = []
    sent: list[Request] = []
    for _ in range(count):
        what = chance.random()
        if sent and what < 0.1:
            yield chance.choice(sent[-8:])
            continue
        if what < 0.4:
            request = _completion(chance, engine, contexts, unit)
            sent.append(request)
            yield request
            continue
        if len(alive) < CONVERSATIONS and (not alive or what > 0.75):
            alive.append(_begun(chance, engine, contexts))
        conversation = chance.choice(alive)
        conversation.messages.append({"role": "user", "content": _words(chance, chance.randint(unit // 4, unit * 2))})
        request = _turn(chance, conversation)
        sent.append(request)
        answer = yield request
        conversation.messages.append({"role": "assistant", "content": answer.text or "yes"})
        if (answer.prompt_tokens or 0) > SHARE_OF_CONTEXT * engine.max_model_len or answer.status != 200:
            alive.remove(conversation)


def _begun(chance: random.Random, engine: EngineTraits, contexts: Sequence[str]) -> _Conversation:
    system = {"role": "system", "content": chance.choice(contexts)}
    return _Conversation(chance.choice(engine.models), chance.choice(SALTS), _rank(chance, engine), [system])


def _turn(chance: random.Random, conversation: _Conversation) -> Request:
    body = {"messages": list(conversation.messages)}
    return Request(CHAT, _finished(chance, body, conversation.model, conversation.salt), conversation.rank)


def _completion(chance: random.Random, engine: EngineTraits, contexts: Sequence[str], unit: int) -> Request:
    """A context cut anywhere, and a text of its own."""
    context = chance.choice(contexts).split()
    beginning = " ".join(context[: chance.randint(len(context) // 2, len(context))])
    body = {"prompt": f"{beginning} {_words(chance, chance.randint(1, unit))}"}
    model, salt = chance.choice(engine.models), chance.choice(SALTS)
    return Request(COMPLETIONS, _finished(chance, body, model, salt), _rank(chance, engine))


def _finished(chance: random.Random, body: dict[str, Any], model: str, salt: str | None) -> dict[str, Any]:
    whole = {"model": model, **body, "max_tokens": chance.randint(1, 40), "temperature": 0}
    if salt is not None:
        whole["cache_salt"] = salt
    if chance.random() < 0.25:
        whole |= {"stream": True, "stream_options": {"include_usage": True}}
    return whole


def _rank(chance: random.Random, engine: EngineTraits) -> int | None:
    return chance.randrange(engine.ranks) if engine.ranks > 1 else None


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=max(count, 1)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _parsed(where: str, text: str, ranks: int) -> Request:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    body = line.get("body") if isinstance(line, dict) else None
    if not isinstance(body, dict):
        raise ValueError(f'{where} is not {{"path": ..., "body": {{...}}}}')
    path, rank = line.get("path") or (CHAT if "messages" in body else COMPLETIONS), line.get("data_parallel_rank")
    if not isinstance(path, str) or not path.startswith("/"):
        raise ValueError(f"{where}: path {str(path)[:80]!r} does not begin with /")
    if rank is not None and not (isinstance(rank, int) and 0 <= rank < ranks):
        raise ValueError(f"{where}: data_parallel_rank {rank!r} is not within 0..{ranks - 1} (ranks=N of --engine)")
    return Request(path, body, rank)
