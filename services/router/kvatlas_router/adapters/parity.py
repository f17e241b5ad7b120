"""Checks the tokens made here against every engine's own, and remembers who disagrees.

An engine is checked when it is met, again every `recheck_s`, and when it comes back after it was down. What cannot be
checked (no answer, no `/tokenize`) is not a disagreement.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from pydantic import SecretStr

from kvatlas_common.engines.asking import AskFailed, tokenize
from kvatlas_common.findings import Code, Finding
from kvatlas_common.fleet import EngineView, Fleet, Health
from kvatlas_common.prompts import PromptError, PromptPipeline, Unrenderable, understand
from kvatlas_router.adapters import background
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.parity import SAMPLES, difference, judge

log = logging.getLogger(__name__)

CHECKS_AT_ONCE = 4
RETRY_S = 5.0
_REFUSALS = frozenset({400, 422})


class Local(Protocol):
    pipeline: PromptPipeline | None

    async def loaded(self) -> PromptPipeline | None: ...
    async def run(self, job: Callable[[], Any], size: int) -> Any: ...


class Models(Protocol):
    def local(self, view: EngineView, model: str) -> Local: ...


class Unchecked(Exception):
    """The engine could not be asked; the message says why."""


class Parity:
    """An async context. One entry per HTTP address of the fleet."""

    def __init__(
        self,
        models: Models,
        session: aiohttp.ClientSession,
        api_key: Callable[[EngineView], SecretStr | None],
        recheck_s: float,
        metrics: Metrics,
    ) -> None:
        self._models = models
        self._session = session
        self._api_key = api_key
        self._recheck_s = recheck_s
        self._metrics = metrics
        self._ready: dict[str, EngineView] = {}
        self._due: dict[str, float] = {}
        self._compared: set[str] = set()
        self._disagreements: dict[str, Finding] = {}
        self._unchecked: dict[str, Finding] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = background.start(self._keep_checking(), "parity")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        if self._task is not None:
            await background.stop(self._task)

    def disagrees(self, view: EngineView) -> bool:
        """Whether its tokens and ours differed, as last seen."""
        return view.id.address in self._disagreements

    def findings(self) -> dict[str, Finding]:
        """By address: whose tokens differ from ours, or could not be compared."""
        return self._unchecked | self._disagreements

    def checked(self, address: str) -> bool:
        """Whether the engine's answers could be compared, with whatever result."""
        return address in self._compared

    def meet(self, fleet: Fleet) -> None:
        ready = {v.id.address: v for v in fleet.engines.values() if v.health is Health.READY and v.models}
        if ready.keys() - self._ready.keys():
            self._news.set()
        self._ready = ready
        self._due = {a: due for a, due in self._due.items() if a in ready}
        self._compared &= ready.keys()
        self._unchecked = {a: why for a, why in self._unchecked.items() if a in ready}
        known = {e.address for e in fleet.engines}
        self._disagreements = {a: why for a, why in self._disagreements.items() if a in known}

    async def _keep_checking(self) -> None:
        while True:
            now = time.monotonic()
            due = [v for a, v in self._ready.items() if self._due.get(a, now) <= now][:CHECKS_AT_ONCE]
            if due:
                await asyncio.gather(*map(self._check, due))
                continue
            self._news.clear()
            pause = min((at - now for at in self._due.values()), default=self._recheck_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)

    async def _check(self, view: EngineView) -> None:
        address = view.id.address
        model = min(view.models - {a.name for a in view.adapters}, default=min(view.models))
        local = self._models.local(view, model)
        pause = RETRY_S
        try:
            if await local.loaded() is not None:
                self._learn(view, model, judge(model, view.root, await self._compare(local, view, model)))
                pause = self._recheck_s
        except Unchecked as error:
            if address not in self._unchecked:
                log.info("engine's tokens not checked", extra={"engine": address, "why": str(error)})
            self._unchecked[address] = _unchecked(str(error))
        self._due[address] = time.monotonic() + pause

    def _learn(self, view: EngineView, model: str, differs: Finding | None) -> None:
        address = view.id.address
        self._unchecked.pop(address, None)
        self._compared.add(address)
        before = self._disagreements.pop(address, None)
        if differs is None:
            if before is not None:
                log.info("engine's tokens agree again", extra={"engine": address, "model": model})
            return
        self._disagreements[address] = differs
        self._metrics.parity.labels(model).inc()

    async def _compare(self, local: Local, view: EngineView, model: str) -> list[str | None]:
        """The difference of each sample."""
        found: list[str | None] = []
        for number, sample in enumerate(SAMPLES, 1):
            body = {"model": model, **sample}
            ours = await local.run(partial(_tokens_of, local, body), 0)
            theirs = await tokens_there(self._session, view.url, body, self._api_key(view))
            found.append(difference(number, ours, theirs))
        return found


def _unchecked(why: str) -> Finding:
    wrong = f"the tokens made here for its prompts cannot be held against its own: {why}"
    change = "let it serve /tokenize (vLLM does), or see to the API key named with api-key-env"
    return Finding(Code.TOKENS_UNCHECKED, wrong, "it serves no /tokenize", change)


def _tokens_of(local: Local, body: Mapping[str, Any]) -> list[int] | None:
    if local.pipeline is None:
        raise Unchecked("its files are not loaded any more")
    return tokens_here(local.pipeline, body)


def tokens_here(pipeline: PromptPipeline, body: Mapping[str, Any]) -> list[int] | None:
    """Of a sample; None where the template refuses, as the engine should then too. Raises `Unchecked`."""
    request = understand("/tokenize", body)
    if isinstance(request, Unrenderable):
        raise Unchecked("a sample is not understood here")
    try:
        found: list[int] = pipeline.tokenize(request).token_ids.tolist()
    except PromptError:
        return None
    except Exception as defect:  # templates can raise anything; it may quote the sample, which is no secret
        raise Unchecked(f"a sample cannot be tokenised here: {defect!r}"[:200]) from None
    return found


async def tokens_there(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], api_key: SecretStr | None
) -> list[int] | None:
    """The same by an engine. Raises `Unchecked`."""
    try:
        return list(await tokenize(session, url, body, api_key=api_key))
    except AskFailed as error:
        if error.status in _REFUSALS:
            return None
        raise Unchecked(str(error)) from None
