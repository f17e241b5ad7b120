"""The indexer over HTTP, for people and scripts: engines, blocks, matches, what is wrong, health, metrics, and a page
that shows them.

Loopback unless told otherwise: nothing here changes anything, but it tells who holds what. Errors have OpenAI's shape,
`{"error": {"message", "type", "code"}}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException

from kvatlas_common.blocks.extras import Lora, PromptExtras, UnknownExtra
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.findings import Found
from kvatlas_common.fleet import EngineView, Sync
from kvatlas_common.history import ESTIMATE_PROFILE
from kvatlas_common.words import BlockKey, EngineId, Medium
from kvatlas_indexer.adapters.findings import CHECKED
from kvatlas_indexer.adapters.http_server import LimitBody, serve
from kvatlas_indexer.adapters.rest_json import (
    BlocksBody,
    MatchBody,
    block_key,
    engine_json,
    holders_json,
    match_json,
)
from kvatlas_indexer.core.contracts import Index, IndexUnavailable, UnknownModel

__all__ = ["build_app", "serve"]

BODY_BYTES_MAX = 16 << 20
PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Blocks = Callable[[EngineId], Mapping[Medium, int]]


class Refused(Exception):
    """A request that cannot be answered, and why."""

    def __init__(self, status: int, message: str, code: str) -> None:
        self.status, self.message, self.code = status, message, code


def build_app(
    index: Index,
    *,
    ready: Callable[[], bool],
    registry: CollectorRegistry,
    blocks: Blocks | None = None,
    findings: Callable[[], Sequence[Found]] = tuple,
) -> FastAPI:
    """`ready`: whether lookups may be sent here. `blocks`: distinct blocks an engine holds, per medium."""
    app = FastAPI(title="KV Atlas indexer", docs_url=None, redoc_url=None)
    app.add_middleware(LimitBody, bytes_max=BODY_BYTES_MAX, answer=_error(413, "the body is too long", "too_large"))
    _answer_errors(app)
    _add_lookups(app, index, blocks)
    _add_operations(app, ready, registry, findings)
    return app


def _add_lookups(app: FastAPI, index: Index, blocks: Blocks | None) -> None:
    def shown(view: EngineView) -> dict[str, object]:
        if blocks is None or view.sync is Sync.UNKNOWN:  # unknown is not empty
            return engine_json(view, index.load(view.id), None)
        return engine_json(view, index.load(view.id), blocks(view.id))

    @app.get("/v1/engines")
    async def engines() -> JSONResponse:
        return JSONResponse({"engines": [shown(view) for view in index.fleet().engines.values()]})

    @app.get("/v1/engines/{engine_id:path}")
    async def engine(engine_id: str) -> JSONResponse:
        try:
            view = index.fleet().engines.get(EngineId.parse(engine_id))
        except ValueError as error:
            raise Refused(400, str(error), "invalid_engine") from error
        if view is None:
            raise Refused(404, f"engine {engine_id} is not known", "engine_not_found")
        return JSONResponse(shown(view))

    @app.get("/v1/blocks/{key}")
    async def block(key: str, model: str | None = None) -> JSONResponse:
        """`model` may be left out where all engines serve the same."""
        try:
            number = block_key(key)
        except ValueError as error:
            raise Refused(400, f"key: {error}", "invalid_key") from error
        model = model or _only_model(index)
        (holders,) = await index.holders(model, [number])
        return JSONResponse(holders_json(model, number, holders))

    @app.post("/v1/blocks")
    async def blocks_of(body: BlocksBody) -> JSONResponse:
        model, keys = body.model or _only_model(index), [BlockKey(key) for key in body.keys]
        found = await index.holders(model, keys)
        return JSONResponse({"blocks": [holders_json(model, *each) for each in zip(keys, found, strict=True)]})

    @app.post("/v1/match")
    async def match(body: MatchBody) -> JSONResponse:
        prompts = await _prompts(body, index.fleet().serving(body.model))
        answer = await index.match(body.model, prompts, body.engines, estimate=body.estimate)
        return JSONResponse(match_json(body.model, prompts, answer))


def _add_operations(
    app: FastAPI, ready: Callable[[], bool], registry: CollectorRegistry, findings: Callable[[], Sequence[Found]]
) -> None:
    @app.get("/v1/findings")
    async def current_findings() -> JSONResponse:
        """What is wrong now, the worst first, with the cause and the change to make."""
        return JSONResponse({"findings": [found.as_json() for found in findings()], "checked": list(CHECKED)})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=PAGE_HEADERS)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse({"status": "ready"}) if ready() else JSONResponse({"status": "not ready"}, 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    text = PAGE.read_text(encoding="utf-8")


def _only_model(index: Index) -> str:
    models = index.fleet().models()
    if len(models) == 1:
        return models[0]
    known = ", ".join(models[:10]) or "none is known yet"
    raise Refused(400, f"model: say which (?model=): {known}", "model_required")


async def _prompts(body: MatchBody, engines: tuple[EngineView, ...]) -> dict[str, list[int]]:
    """Hash profile name -> keys of the prompt, for the profiles asked for or those of `engines`. Raises `Refused`."""
    names = [body.profile] if body.profile else sorted({view.profile for view in engines if view.profile})
    if body.estimate and body.keys is None and not body.profile:
        names.append(ESTIMATE_PROFILE.name)  # of engines whose own is not known
    if body.keys is not None:
        if len(names) > 1:
            raise Refused(400, f"profile: say whose keys these are: {', '.join(names)}", "profile_required")
        return {name: list(body.keys) for name in names}
    prompts: dict[str, list[int]] = {}
    for name in names:
        try:
            profile = HashProfile.parse(name)
            extras = PromptExtras(_lora(body.model, name, engines), body.cache_salt)
            keys = await asyncio.to_thread(prompt_keys, profile, body.token_ids or [], extras)
        except (UnknownExtra, ValueError) as error:
            raise Refused(400, f"profile: {error}", "invalid_profile") from error
        prompts[name] = keys.tolist()
    return prompts


def _lora(model: str, profile: str, engines: tuple[EngineView, ...]) -> Lora | None:
    """The adapter that `model` names on the engines of this profile, if it names one."""
    for view in engines:
        adapter = view.adapter(model)
        if adapter is not None and profile in (view.profile, ESTIMATE_PROFILE.name):
            return Lora(adapter.name, adapter.number, adapter.path)
    return None


def _error(status: int, message: str, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _error(error.status, error.message, error.code)

    @app.exception_handler(UnknownModel)
    async def unknown_model(_: Request, error: UnknownModel) -> JSONResponse:
        return _error(404, f"model: no engine serves it: {error}", "model_not_found")

    @app.exception_handler(IndexUnavailable)
    async def unavailable(_: Request, error: IndexUnavailable) -> JSONResponse:
        return _error(503, str(error), "index_unavailable")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        message = str(first["msg"]).removeprefix("Value error, ")
        return _error(400, f"{where}: {message}" if where else message, "invalid_request")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), str(error.detail).lower().replace(" ", "_"))

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> JSONResponse:
        return _error(500, "an error of the indexer's own; its log has more", "internal_error")
