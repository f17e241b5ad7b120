"""The admin port, for operators alone: why a request would go where it would go, and the figures.

`/debug/route` shows tokens, which are as good as the prompt: the port is on loopback unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvatlas_common.findings import Found
from kvatlas_router.adapters.decide import Asked, Decider, Decision, Lookup, UnknownModel
from kvatlas_router.adapters.findings import CHECKED
from kvatlas_router.adapters.http import ROUTES
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.body import Body, InvalidBody
from kvatlas_router.core.choice import NoEngine, Term


def build_admin(
    decider: Decider,
    metrics: Metrics,
    session_header: str,
    body_bytes_max: int,
    findings: Callable[[], Sequence[Found]],
) -> FastAPI:
    app = FastAPI(title="KV Atlas router", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/debug/findings")
    async def current_findings() -> dict[str, Any]:
        """What is wrong now, the worst first, with the cause and the change to make."""
        return {"findings": [found.as_json() for found in findings()], "checked": list(CHECKED)}

    @app.post("/debug/route")
    async def debug_route(request: Request, path: str | None = None) -> Response:
        """A completion body in; `?path=` names its API where the body does not tell it."""
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > body_bytes_max:
                return _error(413, f"the body is larger than {body_bytes_max} bytes")
        try:
            body = Body.parse(raw)
            api = path or ("/v1/chat/completions" if "messages" in body.fields else "/v1/completions")
            asked = Asked(api, ROUTES.get(api, Lookup.PROMPT), body, request.headers.get(session_header))
            decision = await decider.decide(asked)
        except InvalidBody as error:
            return _error(400, str(error))
        except UnknownModel as error:
            return _error(404, f"no engine serves {error.model[:128]!r}; served: {', '.join(error.served)}")
        except NoEngine as error:
            return _error(503, str(error))
        return Response(msgspec.json.encode(explained(decision)), media_type="application/json")

    return app


def explained(decision: Decision) -> Mapping[str, Any]:
    """All a decision was made from, as JSON."""
    learnt = decision.learnt
    prompt = learnt.prompt
    return {
        "model": decision.model,
        "engine": str(decision.choice.engine.id),
        "reason": str(decision.choice.reason),
        "failure": learnt.failure or None,
        "prompt_tokens": learnt.prompt_tokens,
        "tokenised": prompt.where if prompt else None,
        "complete": prompt.complete if prompt else None,
        "comparable": decision.comparable,
        "token_ids": [int(t) for t in prompt.token_ids] if prompt else None,
        "keys": {profile: keys.tolist() for profile, keys in learnt.keys.items()},
        "engines": [_weighed(term, decision) for term in decision.choice.terms],
        "stages_ms": {name: round(seconds * 1000, 3) for name, seconds in learnt.stages.items()},
    }


def _weighed(term: Term, decision: Decision) -> Mapping[str, Any]:
    answer = decision.learnt.answer
    match = next((m for m in answer.matches if m.engine == term.engine), None) if answer else None
    return {
        "engine": str(term.engine),
        "standing": term.state.standing.name.lower(),
        "health": term.view.health,
        "sync": term.view.sync,
        "profile": term.view.profile,
        "matched_blocks": match.blocks if match else None,
        "media": dict(match.media) if match else None,
        "exact": match.exact if match else None,
        "doubtful": match.doubtful if match else None,
        "cached_tokens": term.cached_tokens,
        "tokens_to_compute": term.to_compute,
        "queued_tokens": term.ahead.queued_tokens,
        "pending": term.ahead.pending,
        "decoding": term.ahead.decoding,
        "ttft_ms": round(term.cost.ttft_ms, 3),
        "cost_ms": round(term.cost.total_ms, 3),
        "cost": {name: round(value, 3) for name, value in term.cost._asdict().items()},
    }


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)
