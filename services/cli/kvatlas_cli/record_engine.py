"""The engine being recorded, as it is asked over HTTP: what it serves, how it tokenises, and completions."""

from __future__ import annotations

import json
from collections.abc import Mapping

import aiohttp

from kvatlas_cli.record_answers import Answer, Request, read_answer, to_tokenize
from kvatlas_common.engines.asking import METRICS_ALL, AskFailed, ask, tokenize
from kvatlas_common.engines.pages import CacheConfig, MalformedPage, ServedModels, parse_metrics, parse_models
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.prompts.requests import CHAT, COMPLETIONS

RANK_HEADER = "X-data-parallel-rank"
ANSWER_BYTES_MAX = 256 << 20
PAGE_TIMEOUT_S = 10.0


class RecordFailed(Exception):
    """Recording cannot go on. `str()` names the cause and the cure."""


class RecordedEngine:
    """`timeout_s`: of one completion, from sending to its last byte."""

    def __init__(self, session: aiohttp.ClientSession, spec: EngineSpec, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self.spec = spec

    async def models(self) -> tuple[bytes, ServedModels]:
        """`/v1/models`, as it came and as it reads. Raises `RecordFailed`."""
        try:
            page = await ask(
                self._session, self.spec.url, "/v1/models", api_key=self.spec.api_key, timeout_s=PAGE_TIMEOUT_S
            )
            return page, parse_models(page)
        except (AskFailed, MalformedPage) as error:
            raise RecordFailed(f"engine {self.spec.url}: {error}. Is --engine its HTTP address?") from None

    async def metrics(self) -> tuple[bytes, CacheConfig, int]:
        """`/metrics` as it came, the cache's settings, and how many requests are running. Empty where there is none."""
        try:
            page = await ask(
                self._session, self.spec.url, METRICS_ALL, api_key=self.spec.api_key, timeout_s=PAGE_TIMEOUT_S
            )
        except AskFailed:
            return b"", CacheConfig(), 0
        parsed = parse_metrics(page)
        return page, parsed.cache or CacheConfig(), parsed.running or 0

    async def reset_cache(self) -> None:
        """Raises `RecordFailed`."""
        try:
            await ask(
                self._session,
                self.spec.url,
                "/reset_prefix_cache",
                api_key=self.spec.api_key,
                timeout_s=PAGE_TIMEOUT_S,
                body=b"",
            )
        except AskFailed as error:
            cure = "vLLM has it when VLLM_SERVER_DEV_MODE=1 is in its environment; or restart the engine instead"
            raise RecordFailed(f"--reset: {error}. {cure}") from None

    async def prompt_token_ids(self, request: Request) -> list[int] | None:
        """What the engine's /tokenize makes of the prompt; None where it cannot tell."""
        question = to_tokenize(request)
        if question is None or isinstance(question, list):
            return question
        try:
            return list(
                await tokenize(
                    self._session, self.spec.url, question, api_key=self.spec.api_key, timeout_s=PAGE_TIMEOUT_S
                )
            )
        except AskFailed:
            return None

    async def complete(self, request: Request) -> Answer:
        """Asks for token ids besides, where the API has them. Raises `RecordFailed` when the engine is gone."""
        body = dict(request.body)
        if request.path in (CHAT, COMPLETIONS):
            body.setdefault("return_token_ids", True)
        try:
            async with self._session.post(
                self.spec.url + request.path,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", **self._headers(request.rank)},
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            ) as response:
                raw = await read_bounded(response)
                streamed = response.content_type == "text/event-stream"
        except TimeoutError:
            raise RecordFailed(f"engine {self.spec.url} did not answer within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise RecordFailed(f"engine {self.spec.url} is gone: {error}") from None
        return read_answer(response.status, raw, streamed)

    def _headers(self, rank: int | None) -> Mapping[str, str]:
        key = self.spec.api_key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        return headers if rank is None else {**headers, RANK_HEADER: str(rank)}


async def read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body; empty, read to its end all the same, when it is longer than `ANSWER_BYTES_MAX`."""
    kept, fits = bytearray(), True
    async for chunk in response.content.iter_any():
        fits = fits and len(kept) + len(chunk) <= ANSWER_BYTES_MAX
        if fits:
            kept += chunk
    return bytes(kept) if fits else b""
