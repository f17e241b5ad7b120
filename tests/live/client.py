"""Sends one request through the router as an OpenAI client would, and reads what it needs of the answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.live.comparison import Exchange
from tests.live.workload import Ask


@dataclass(slots=True)
class _Answer:
    text: str = ""
    usage: dict[str, Any] | None = None
    error: str = ""

    def read(self, page: dict[str, Any]) -> None:
        """One answer, or one chunk of a streamed one."""
        for choice in page.get("choices", ()):
            said = choice.get("message") or choice.get("delta") or choice
            self.text += said.get("content") or said.get("text") or ""
        self.usage = page.get("usage") or self.usage
        if "error" in page:
            self.error = json.dumps(page["error"])[:300]


async def send(session: aiohttp.ClientSession, base: str, ask: Ask) -> tuple[Exchange, str]:
    """The exchange, and the answer's text. An error of the server is an exchange too; one of the network raises."""
    answer = _Answer()
    sent = time.monotonic()
    async with session.post(base + ask.path, json=ask.body) as response:
        if response.status != 200:
            answer.error = (await response.text())[:300]
        elif ask.streamed:
            async for chunk in _chunks(response):
                answer.read(chunk)
        else:
            answer.read(await response.json())
        done = time.monotonic()
        header = response.headers
    usage = answer.usage or {}
    predicted = header.get("x-kvatlas-cached-tokens")
    exchange = Exchange(
        number=ask.number,
        kind=ask.kind,
        streamed=ask.streamed,
        conversation=ask.conversation,
        turn=ask.turn,
        status=response.status,
        engine=header.get("x-kvatlas-engine"),
        reason=header.get("x-kvatlas-reason", ""),
        predicted=None if predicted is None else int(predicted),
        actual=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        prompt_tokens=usage.get("prompt_tokens", 0),
        sent_s=sent,
        done_s=done,
        error=answer.error,
    )
    return exchange, answer.text


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line.removeprefix(b"data: "))
