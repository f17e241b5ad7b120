"""One question to one engine over HTTP: bounded in time and size, redirects refused, every failure one exception.

Engines are strangers: whatever answers at their port may be slow, huge, or not HTTP at all.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from pydantic import SecretStr

from kvatlas_common.engines.pages import METRIC_NAMES, MalformedPage, parse_tokenized

# prometheus_client's ASGI app filters by `name[]`. vLLM 0.32 mounts it behind a route at `/metrics` that does not; with
# the slash the mount answers (`serve/instrumentator/metrics.py`): 2 KB instead of 50 KB, in a third of the time.
METRICS_FEW = "/metrics/?" + "&".join(f"name[]={name}" for name in METRIC_NAMES)
METRICS_ALL = "/metrics"


class AskFailed(Exception):
    """No usable answer. `refused`: nobody listens there. `status`: the HTTP status, when there was one."""

    def __init__(self, why: str, *, refused: bool = False, status: int | None = None) -> None:
        super().__init__(why)
        self.refused = refused
        self.status = status


def open_session() -> aiohttp.ClientSession:
    """A session to ask engines with, to be shared and closed by the caller: keeps connections, keeps no cookies.

    Connections are not limited here: a probe that waited for one would find a healthy engine hung. Whoever asks limits
    how much is asked at once.
    """
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        # uvicorn, and so vLLM, closes a connection that was idle for 5 s; a POST that meets the closing is lost.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        auto_decompress=False,  # nothing compressed is asked for, and none is unpacked
    )


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    path: str,
    *,
    api_key: SecretStr | None = None,
    timeout_s: float = 2.0,
    bytes_max: int = 4 << 20,
    body: bytes | None = None,
) -> bytes:
    """GET, or POST with a JSON `body`. The whole answer to a 2xx; anything else raises `AskFailed`."""
    headers = {"Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key.get_secret_value()}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    name = path.partition("?")[0]
    try:
        async with session.request(
            "GET" if body is None else "POST",
            url + path,
            headers=headers,
            data=body,
            allow_redirects=False,  # the key is for this engine alone
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as answer:
            if not 200 <= answer.status < 300:
                raise AskFailed(f"{name} answered {answer.status}{_cure(answer.status)}", status=answer.status)
            return await _read(answer, name, bytes_max)
    except TimeoutError:
        raise AskFailed(f"{name} did not answer within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
        why = "nobody listens there" if refused else f"{type(error).__name__}: {str(error)[:160]}"
        raise AskFailed(f"{name}: {why}", refused=refused) from None


async def tokenize(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    *,
    api_key: SecretStr | None = None,
    timeout_s: float = 5.0,
) -> tuple[int, ...]:
    """The engine's own token ids of `{"model", "messages" | "prompt", ...}` (vLLM's `/tokenize`). Raises `AskFailed`.

    `url` is the engine's base URL. No error repeats the prompt or what the engine says about it.
    """
    page = await ask(
        session,
        url,
        "/tokenize",
        api_key=api_key,
        timeout_s=timeout_s,
        bytes_max=32 << 20,
        body=json.dumps(body).encode(),
    )
    try:
        return parse_tokenized(page)
    except MalformedPage as error:
        raise AskFailed(str(error)) from None


async def _read(answer: aiohttp.ClientResponse, name: str, bytes_max: int) -> bytes:
    page = bytearray()
    async for chunk in answer.content.iter_any():
        page += chunk
        if len(page) > bytes_max:
            raise AskFailed(f"{name} is larger than {bytes_max} bytes", status=answer.status)
    return bytes(page)


def _cure(status: int) -> str:
    return ": it wants an API key (api-key-env), or another one" if status in (401, 403) else ""
