"""The peer: NVIDIA Dynamo's standalone indexer, where `KVATLAS_BENCH_DYNAMO` names a Python that has the package
`ai-dynamo-runtime`. It gets the same events from the same sockets, and is asked for the same prompts.

It names blocks itself: xxh3_64 with seed 1337 over the token ids (u32, little-endian), each block on its own, as signed
integers; a prompt's blocks are found from its first one on, and counted in tokens. Version 1.6.1: `python -m
dynamo.indexer --help`, `POST /query_by_hash` (such names) and `POST /query` (token ids). It runs as it is shipped, with
four threads that index.

It is asked by hand over one connection that stays open, with bodies written ahead: an HTTP client of Python's takes
longer than its answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kvatlas_loadtest.bench.deployment import until
from kvatlas_loadtest.bench.feeds import Feed, Prompt
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_loadtest.valkey import free_port

NAME = "NVIDIA Dynamo, standalone indexer"
ANSWER_BYTES_MAX = 1 << 22
_SEED = 1337
_LENGTH = b"content-length:"


def python() -> str | None:
    """A Python with Dynamo's indexer; None: there is no peer."""
    return os.environ.get("KVATLAS_BENCH_DYNAMO") or None


@dataclass(frozen=True, slots=True)
class Question:
    """A request, written out."""

    data: bytes

    @classmethod
    def by_hash(cls, prompt: Prompt) -> Question:
        return cls._of("/query_by_hash", "block_hashes", names(prompt))

    @classmethod
    def by_tokens(cls, prompt: Prompt) -> Question:
        return cls._of("/query", "token_ids", prompt.tokens.tolist())

    @classmethod
    def _of(cls, path: str, field: str, numbers: Sequence[int]) -> Question:
        body = json.dumps({"model_name": MODEL, field: numbers}, separators=(",", ":")).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: dynamo\r\nContent-Type: application/json\r\n"
        return cls(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


class Dynamo:
    """A running one, and a connection to it. `pid`: of its process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self.pid = pid
        self._reader, self._writer = reader, writer

    async def found(self, prompt: Prompt, engine: int, blocks: int) -> bool:
        """Whether a lookup finds so many leading blocks of a prompt on an engine (counted from 0)."""
        found, _ = await self.ask(Question.by_hash(prompt))
        return found.get(engine, 0) == blocks * prompt.block_size

    async def ask(self, question: Question) -> tuple[dict[int, int], float]:
        """Engine -> leading tokens; seconds from the request to its answer, understood."""
        began = time.perf_counter()
        self._writer.write(question.data)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        (length,) = (line[len(_LENGTH) :] for line in head.split(b"\r\n") if line.startswith(_LENGTH))
        answer = await self._reader.readexactly(int(length))
        if not head.startswith(b"http/1.1 200 "):
            raise ValueError(f"Dynamo answered {head!r} {answer[:200]!r}")
        found = {int(engine) - 1: ranks["0"] for engine, ranks in json.loads(answer)["scores"].items()}
        return found, time.perf_counter() - began


def names(prompt: Prompt) -> list[int]:
    data = prompt.tokens.astype("<u4").tobytes()
    size = 4 * prompt.block_size
    hashes = [xxhash.xxh3_64_intdigest(data[at : at + size], seed=_SEED) for at in range(0, len(data), size)]
    signed: list[int] = np.array(hashes, np.uint64).view(np.int64).tolist()
    return signed


@asynccontextmanager
async def dynamo(folder: Path, feeds: Sequence[Feed], block_size: int) -> AsyncIterator[Dynamo]:
    """Listens to these engines. Raises `TimeoutError` when it does not."""
    interpreter, port = python(), free_port()
    assert interpreter is not None
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    workers = ",".join(f"{number}={feed.endpoint}" for number, feed in enumerate(feeds, start=1))
    command = ["-m", "dynamo.indexer", "--port", str(port), "--block-size", str(block_size)]
    command += ["--model-name", MODEL, "--workers", workers]
    with (folder / "dynamo.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(interpreter, *command, stdout=log, stderr=log)
    try:
        async with _connected(port) as (reader, writer):
            peer = Dynamo(reader, writer, process.pid)
            await _listening(peer, feeds, Prompt(np.random.default_rng(0), 1, block_size))
            yield peer
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def answers() -> bool:
        try:
            opened.append(await asyncio.open_connection("127.0.0.1", port, limit=ANSWER_BYTES_MAX))
        except OSError:
            return False
        return True

    await until(answers, "Dynamo to take a connection")
    try:
        yield opened[0]
    finally:
        opened[0][1].close()


async def _listening(peer: Dynamo, feeds: Sequence[Feed], warm_up: Prompt) -> None:
    """What is published before it has subscribed is lost: it is said again."""
    question = Question.by_hash(warm_up)

    async def listens() -> bool:
        for feed in feeds:
            await feed.send(warm_up.message(0, 1))
        await asyncio.sleep(0.1)
        found, _ = await peer.ask(question)
        return len(found) == len(feeds)

    await until(listens, "Dynamo to listen to every engine")
