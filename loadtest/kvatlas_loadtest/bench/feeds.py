"""KV events as engines publish them, encoded ahead so that sending them costs nothing.

Messages of at most 94 blocks in vLLM 0.32's encoding, token ids and all. Tokens are drawn at random, and hashes too
unless they are needed, but for each engine's first block: from its true hash the profile is learnt.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache

import numpy as np
import zmq
import zmq.asyncio

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import Keys, prompt_keys
from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_loadtest.bench.deployment import Service, page, until
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_loadtest.events import EventEncoder, WireVersion
from kvatlas_loadtest.hashing import PromptChain
from kvatlas_loadtest.kv_events import Stored, key_of

EVENT_BLOCKS = 94
VOCABULARY = 150_000
SAY_AGAIN_S = 0.2
ENCODED_AT = time.time()
"""The `ts` of all messages: none may seem older than one that was sent before it."""


def profile(block_size: int) -> HashProfile:
    return HashProfile(Algorithm.SHA256_CBOR, "42", block_size, ExtraKeys.TAGGED)


def hash_flags(block_size: int) -> tuple[str, ...]:
    """How a service is told of that profile."""
    return ("--hash-seed", "42", "--block-size", str(block_size), "--prefix-caching-hash-algo", "sha256_cbor")


class Prompt:
    """Token ids that no other prompt has, and the hashes an engine would publish for their blocks: drawn, or `true`."""

    def __init__(self, rng: np.random.Generator, blocks: int, block_size: int, *, true: bool = False) -> None:
        self.block_size = block_size
        self.tokens = rng.integers(VOCABULARY, size=blocks * block_size, dtype=np.uint32)
        drawn = self.true_keys() if true else rng.integers(2**64 - 1, size=blocks, dtype=np.uint64)
        self.keys: list[int] = drawn.tolist()
        self._made: dict[tuple[int, int], bytes] = {}

    def true_keys(self) -> Keys:
        """Of all its blocks: a request has one token more, which is to be computed in any case."""
        return prompt_keys(profile(self.block_size), np.append(self.tokens, np.uint32(0)))

    def message(self, start: int, stop: int) -> bytes:
        """That an engine has stored these blocks. Engines that store the same say so in the same bytes."""
        if (start, stop) not in self._made:
            keys, size = self.keys[start:stop], self.block_size
            tokens = self.tokens[start * size : stop * size].tolist()
            parent = self.keys[start - 1] if start else None
            self._made[start, stop] = stored(keys, tokens, size, parent)
        return self._made[start, stop]


@lru_cache(maxsize=4)
def first_message(block_size: int) -> bytes:
    """One block with its true hash."""
    tokens = list(range(block_size))
    hashes = [key_of(each) for each in PromptChain(profile(block_size), PromptExtras()).extend(tokens)]
    return stored(hashes, tokens, block_size)


def stored(keys: Sequence[int], tokens: Sequence[int], block_size: int, parent: int | None = None) -> bytes:
    """A message that says so of these blocks."""
    event = Stored(keys, parent, tokens, (None,) * len(keys))
    return EventEncoder(WireVersion.V0_32, block_size).batch([event], ENCODED_AT)


class Feed:
    """An engine's publisher, which binds. It drops nothing for a subscriber that is slow: memory is the bound."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind("tcp://127.0.0.1:0")
        self._topic = f"kv@{address}@{MODEL}".encode()
        self._seq = 0
        self.address = address
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def flags(self) -> tuple[str, str]:
        """How an indexer is told of the engine."""
        return "--engine", f"{self.address},events={self.endpoint}"

    async def send(self, payload: bytes) -> None:
        await self._socket.send_multipart((self._topic, self._seq.to_bytes(8, "big"), payload))
        self._seq += 1

    def close(self) -> None:
        self._socket.close(linger=0)


@asynccontextmanager
async def feeds(addresses: Sequence[str]) -> AsyncIterator[list[Feed]]:
    context = zmq.asyncio.Context()
    made = [Feed(context, address) for address in addresses]
    try:
        yield made
    finally:
        for feed in made:
            feed.close()
        context.term()


async def begin(made: Sequence[Feed], owners: Sequence[Service], block_size: int) -> None:
    """Each engine is indexed by its owner and nobody else. What is published before that is lost: it is said again."""

    async def begun() -> bool:
        for feed in made:
            await feed.send(first_message(block_size))
        return await _known(made, owners)

    await until(begun, "every engine to be known to its owner", every_s=SAY_AGAIN_S)


async def taken_in(blocks: int, made: Sequence[Feed], owners: Sequence[Service]) -> None:
    """Waits until the index has all that was sent: no figure comes from a run that lost some."""
    services = {owner.pid: owner for owner in owners}.values()

    async def all_there() -> bool:
        views = [view for s in services for view in (await page(f"{s.rest}/v1/engines"))["engines"]]
        held: int = sum((view["blocks"] or {}).get("gpu", 0) for view in views)
        return held == blocks

    await until(all_there, f"{blocks} blocks of {len(made)} engines to be in the index")


async def _known(made: Sequence[Feed], owners: Sequence[Service]) -> bool:
    for owner in {owner.pid: owner for owner in owners}.values():
        views = {view["id"]: view for view in (await page(f"{owner.rest}/v1/engines"))["engines"]}
        for feed, its in zip(made, owners, strict=True):
            view = views.get(feed.address, {"health": "", "blocks": None})
            if view["health"] != "ready" or (view["blocks"] or {}) != ({"gpu": 1} if its is owner else {}):
                return False
    return True
