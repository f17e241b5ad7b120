"""The HTTP side of a simulated engine: vLLM's endpoints, over aiohttp's low-level server.

A client that goes away cancels its handler, which aborts its sequences in the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from kvatlas_common.blocks.extras import Lora, PromptExtras
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.fleet import Adapter
from kvatlas_loadtest import debug
from kvatlas_loadtest.generation import Generation
from kvatlas_loadtest.hashing import PromptChain, published_extra_keys
from kvatlas_loadtest.metrics import metrics_page
from kvatlas_loadtest.openai_requests import Wanted
from kvatlas_loadtest.openai_shapes import DONE, AnswerShape, ApiError, models_page
from kvatlas_loadtest.prompting import Prompter
from kvatlas_loadtest.rank import EngineRank
from kvatlas_loadtest.scheduler import EngineFull, EngineRequest, PromptTooLong
from kvatlas_loadtest.vocabulary import Vocabulary

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY_BYTES_MAX = 64 * 1024 * 1024
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Serving:
    """What an engine serves, and how. `root`: the model's files, as `/v1/models` names them.

    `debug`: it answers `/debug/*` too, which no engine of vLLM's does.
    """

    model: str
    root: str
    adapters: Sequence[Adapter]
    profile: HashProfile
    hashes_as_bytes: bool
    seed: int
    answer_tokens: int
    api_key: str | None
    version: str
    debug: bool = False


@dataclass(slots=True)
class EngineApi:
    """Answers requests out of `ranks`; `started_at` and `clock` in seconds since the epoch."""

    serving: Serving
    ranks: Sequence[EngineRank]
    prompter: Prompter
    vocabulary: Vocabulary
    clock: Callable[[], float]
    started_at: float
    _routes: dict[str, tuple[str, Handler]] = field(init=False)
    _turn: itertools.count[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self._routes = {
            CHAT: ("POST", self._complete),
            COMPLETIONS: ("POST", self._complete),
            "/tokenize": ("POST", self._tokenize),
            "/reset_prefix_cache": ("POST", self._reset),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ping": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/version": ("GET", self._version),
        }
        if self.serving.debug:
            self._routes["/debug/block_table"] = ("GET", self._block_table)
            self._routes["/debug/faults"] = ("POST", self._faults)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request goes through here."""
        if request.path.startswith("/v1") and not self._authorised(request):
            return _json({"error": "Unauthorized"}, 401)
        method, handler = self._routes.get(request.path, (None, None))
        if handler is None:
            return _json({"detail": "Not Found"}, 404)
        if request.method != method:
            return _json({"detail": "Method Not Allowed"}, 405)
        try:
            return await handler(request)
        except ApiError as error:
            return _json(error.body, error.status)
        except web.HTTPRequestEntityTooLarge:
            return _json(ApiError(413, f"The body exceeds {BODY_BYTES_MAX} bytes.").body, 413)

    async def _complete(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await _body(request)
        wanted = Wanted.of(body)
        lora = self._adapter(wanted.model)
        prompts = self.prompter.prompts(request.path, body)
        generation = Generation(self._rank(request), self.vocabulary, prompts)
        given_id = request.headers.get("X-Request-Id")
        chat = request.path == CHAT
        shape = AnswerShape(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{given_id or secrets.token_hex(8)}",
            model=wanted.model or self.serving.model,
            created=int(self.clock()),
            chat=chat,
            token_ids=wanted.return_token_ids,
        )
        headers = {"X-Request-Id": given_id} if given_id else {}
        try:
            self._start(generation, wanted, lora, chat)
            if wanted.stream:
                return await _stream(request, generation, shape, wanted.include_usage, headers)
            async for _ in generation.pieces():
                pass
            return _json(shape.whole(generation.choices, generation.usage()), headers=headers)
        finally:
            generation.abort()

    def _start(self, generation: Generation, wanted: Wanted, lora: Lora | None, chat: bool) -> None:
        extras = PromptExtras(lora, wanted.cache_salt)
        first_extra_keys, extra_keys = published_extra_keys(extras)
        ends = frozenset(wanted.stop_ids)
        for prompt in generation.prompts:
            longest = generation.rank.core.limits.longest
            if len(prompt) + (wanted.max_tokens or 1) > longest:
                raise ApiError(
                    400,
                    f"This engine's maximum context length is {longest} tokens. However, you requested "
                    f"{wanted.max_tokens or 1} output tokens and your prompt contains {len(prompt)} input tokens.",
                    param="max_tokens" if wanted.max_tokens else "input_tokens",
                )
            max_tokens = wanted.max_tokens or min(self.serving.answer_tokens, longest - len(prompt))
            for choice in range(wanted.choices):
                seed = self.serving.seed + choice
                sample = self.vocabulary.words.sampler(prompt, seed, continues=not chat)
                eos = self.vocabulary.eos if wanted.max_tokens is None else None
                engine_request = EngineRequest(
                    id=f"{len(generation.choices)}",
                    prompt=prompt,
                    max_tokens=max_tokens,
                    chain=PromptChain(self.serving.profile, extras, self.serving.hashes_as_bytes),
                    sample=sample if eos is None else _ending(sample, max_tokens, eos),
                    stop_ids=ends if eos is None else ends | {eos},
                    first_extra_keys=first_extra_keys,
                    extra_keys=extra_keys,
                    lora_name=lora.name if lora else None,
                )
                try:
                    generation.start(engine_request, wanted)
                except EngineFull as error:
                    raise ApiError(503, f"The engine is overloaded: {error}.", "ServiceUnavailableError") from None
                except PromptTooLong as error:
                    raise ApiError(400, f"{error}.") from None

    def _adapter(self, model: str | None) -> Lora | None:
        """None: the model itself. Raises `ApiError` for a name nobody serves."""
        if model is None or model == self.serving.model:
            return None
        for adapter in self.serving.adapters:
            if adapter.name == model:
                return Lora(adapter.name, adapter.number, adapter.path)
        raise ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")

    def _rank(self, request: web.BaseRequest) -> EngineRank:
        """The rank the header names; without one the least loaded, in turn where several are."""
        named = request.headers.get("X-data-parallel-rank")
        if named is None:
            turn = next(self._turn)
            return min(self.ranks, key=lambda r: (r.load, (r.number - turn) % len(self.ranks)))
        if not named.isdecimal() or int(named) >= len(self.ranks):
            raise ApiError(400, f"data_parallel_rank {named[:20]!r} is not within 0..{len(self.ranks) - 1}.")
        return self.ranks[int(named)]

    async def _tokenize(self, request: web.BaseRequest) -> web.Response:
        body = await _body(request)
        self._adapter(Wanted.of(body).model)
        tokens = list(self.prompter.prompts("/tokenize", body)[0])
        length = self.ranks[0].core.limits.longest
        return _json({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": None})

    async def _reset(self, request: web.BaseRequest) -> web.Response:
        refused = [rank for rank in self.ranks if not rank.core.reset()]
        return _json({"success": not refused})

    async def _models(self, request: web.BaseRequest) -> web.Response:
        serving = self.serving
        length = self.ranks[0].core.limits.longest
        return _json(models_page(serving.model, serving.root, serving.adapters, length, int(self.started_at)))

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        page = metrics_page(self.ranks, self.serving.model, self.serving.profile.algorithm, self.started_at)
        return web.Response(text=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _version(self, request: web.BaseRequest) -> web.Response:
        return _json({"version": self.serving.version})

    async def _block_table(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=debug.block_tables(self.ranks), content_type="application/json")

    async def _faults(self, request: web.BaseRequest) -> web.Response:
        try:
            return _json(debug.set_faults(self.ranks, await request.read()))
        except ValueError as error:
            raise ApiError(400, f"{error}") from None

    def _authorised(self, request: web.BaseRequest) -> bool:
        key = self.serving.api_key
        given = request.headers.get("Authorization", "")
        return key is None or secrets.compare_digest(given.encode(), f"Bearer {key}".encode())


def roomy_request(*parts: Any) -> web.BaseRequest:
    """How `web.Server` makes its requests, with room for a body of `BODY_BYTES_MAX` (aiohttp's own limit is 1 MiB)."""
    message, payload, protocol, writer, task = parts
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_BYTES_MAX)


def _ending(sample: Callable[[int], int], length: int, eos: int) -> Callable[[int], int]:
    return lambda index: eos if index + 1 >= length else sample(index)


async def _stream(
    request: web.BaseRequest, generation: Generation, shape: AnswerShape, include_usage: bool, headers: dict[str, str]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", **headers})
    begun: set[int] = set()
    try:
        async for pieces in generation.pieces():
            if not begun:
                await response.prepare(request)
            out = bytearray()
            for piece in pieces:
                choice, first = piece.choice, piece.choice.index not in begun
                if first and shape.chat:
                    out += shape.role_chunk(choice)
                begun.add(choice.index)
                if piece.text or choice.finish_reason or shape.token_ids:
                    out += shape.text_chunk(choice, piece.text, piece.token_ids, first)
            await response.write(bytes(out))
        await response.write((shape.usage_chunk(generation.usage()) if include_usage else b"") + DONE)
        await response.write_eof()
    except ConnectionResetError:
        generation.abort()  # the client is gone: nobody reads what would follow
    return response


async def _body(request: web.BaseRequest) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(await request.read())
    except msgspec.DecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"JSON decode error: {error}", "Bad Request", "body") from None
    if not isinstance(body, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "The body should be an object.", "Bad Request", "body")
    return body


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers or {}
    )
