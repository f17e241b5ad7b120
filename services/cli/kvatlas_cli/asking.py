"""The services as the command asks them: one JSON answer over HTTP, or a reason and a cure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

ADMIN, INDEXER = "http://127.0.0.1:8082", "http://127.0.0.1:8081"
ANSWER_BYTES_MAX = 256 << 20  # /debug/route shows every token of a prompt
ERROR_BYTES_MAX = 1 << 20

Json = Mapping[str, Any]


class Refused(Exception):
    """No answer. `str()` names the cause and the cure."""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom to ask. `flag` names its address on the command line, `command` starts it."""

    base: str
    port: str
    flag: str
    command: str

    @property
    def elsewhere(self) -> str:
        started = f"It is started by `kvatlas up`, or `{self.command}`"
        return f"Is the {self.port} there? {started}; name another address with {self.flag} URL."


def fetch(server: Server, path: str, timeout_s: float, body: bytes | None = None) -> Json:
    """JSON by GET, or POST of `body`. Raises `Refused`."""
    status, page = _asked(server, path, timeout_s, body)
    try:
        said = json.loads(page)
    except ValueError:
        said = None
    if status == 200 and isinstance(said, dict):
        return said
    raise Refused(_refusal(status, said, server))


def fetch_text(server: Server, path: str, timeout_s: float) -> str:
    """Raises `Refused`."""
    status, page = _asked(server, path, timeout_s)
    if status != 200:
        raise Refused(_refusal(status, None, server))
    return page.decode(errors="replace")


def _asked(server: Server, path: str, timeout_s: float, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and answer. The environment's HTTP proxies are not used: the servers are on loopback as a rule."""
    base, status = server.base.rstrip("/"), 200
    try:
        request = Request(base + path, data=body, headers={"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            page = answer.read(ANSWER_BYTES_MAX)
    except HTTPError as error:
        with error:
            status, page = error.code, error.read(ERROR_BYTES_MAX)
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ConnectionRefusedError):
            raise Refused(f"nobody listens at {base}. {server.elsewhere}") from None
        if isinstance(reason, TimeoutError):
            raise Refused(f"{base} did not answer within {timeout_s:g} s (--timeout-s).") from None
        why = "what answers there is not HTTP" if isinstance(reason, HTTPException) else f"{reason}"
        raise Refused(f"{base} cannot be asked: {why}. {server.elsewhere}") from None
    return status, page


def _refusal(status: int, said: Any, server: Server) -> str:
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict) or "not_found" in (error.get("code"), error.get("type")):
        return f"{server.base} answered {status}, and not as a KV Atlas server does: a wrong port? {server.elsewhere}"
    cure = ""
    if status == 404:
        cure = " Name a served model with --model; `kvatlas lookup --engines` lists them."
    elif status == 503:
        cure = " `kvatlas lookup --engines` shows the state of each."
    return f"{server.base} answered {status}: {error.get('message')}.{cure}"


def the_router(base: str) -> Server:
    return Server(base, "router's admin port", "--admin", "kvatlas router")


def the_indexer(base: str) -> Server:
    return Server(base, "indexer's REST port", "--indexer", "kvatlas indexer")
