"""Prompts to tokens and keys: here, with the model's own files, or by an engine where that is impossible or not right.

Files are loaded off the request path when a model is first met. While they load, are missing, or give other tokens than
the engines (`parity`), an engine tokenises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from pydantic import SecretStr

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import Keys, prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.asking import open_session
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import EngineView, Fleet, Health
from kvatlas_common.prompts import (
    PromptError,
    PromptPipeline,
    PromptRequest,
    TokenizedPrompt,
    TokenPrompt,
    Unrenderable,
    understand,
)
from kvatlas_router.adapters.local_model import LocalModel
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.adapters.parity import Parity
from kvatlas_router.adapters.remote_tokens import RemoteTokens, tokenize_body
from kvatlas_router.core.body import Body
from kvatlas_router.core.prompt import NoTokens, Prompt, Where, keys_by_profile

MODELS_MAX = 64


class Tokenizers:
    """All models of the fleet. An async context; `meet` is told of every change of the fleet."""

    def __init__(
        self,
        *,
        files: Mapping[str, str],
        default_files: str | None,
        environ: Mapping[str, str],
        api_key: Callable[[EngineView], SecretStr | None],
        recheck_s: float,
        remote_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        """`files`: model name -> path or hub name, before all else; `default_files`: before what engines say."""
        self._files = files
        self._default_files = default_files
        self._environ = environ
        self._api_key = api_key
        self._recheck_s = recheck_s
        self._remote_timeout_s = remote_timeout_s
        self._metrics = metrics
        self._models: dict[tuple[str, ...], LocalModel] = {}
        self._stack = AsyncExitStack()
        self._remote: RemoteTokens | None = None
        self._parity: Parity | None = None

    async def __aenter__(self) -> Self:
        session = await self._stack.enter_async_context(open_session())
        self._remote = RemoteTokens(session, self._remote_timeout_s)
        parity = Parity(self, session, self._api_key, self._recheck_s, self._metrics)
        self._parity = await self._stack.enter_async_context(parity)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        await self._stack.aclose()
        for model in self._models.values():
            model.close()

    def meet(self, fleet: Fleet) -> None:
        """Loads what new models need, and has new engines checked."""
        if self._parity is not None:
            self._parity.meet(fleet)

    def checked(self, address: str) -> bool:
        """Whether local tokens have been compared with those of the engine at this address."""
        return self._parity is not None and self._parity.checked(address)

    def findings(self) -> dict[str, Finding]:
        """By engine address."""
        return self._parity.findings() if self._parity is not None else {}

    def untokenised(self) -> dict[str, str]:
        """Why the files of a model cannot be used, by model."""
        return {names[0]: local.failure for names, local in self._models.items() if names and local.failed}

    def local(self, view: EngineView, model: str) -> LocalModel:
        """Where prompts for `model` at this engine are tokenised here. The oldest go when there are too many."""
        wanted = self._wanted(view, model)
        if wanted not in self._models:
            if len(self._models) >= MODELS_MAX:
                self._models.pop(next(iter(self._models))).close()
            self._models[wanted] = LocalModel(wanted, self._environ, self._metrics)
        return self._models[wanted]

    async def tokens(self, path: str, body: Body, model: str, engines: Sequence[EngineView]) -> Prompt:
        """Raises `NoTokens`."""
        request = understand(path, body.fields)
        if isinstance(request, Unrenderable):
            raise NoTokens(f"unrenderable:{request.reason}")
        view = next((v for v in engines if v.health is Health.READY), engines[0])
        local = self.local(view, model)
        where = Where.GIVEN if isinstance(request, TokenPrompt) else Where.LOCAL
        pipeline = local.pipeline
        try:
            if pipeline is None or (where is Where.LOCAL and self._distrusted(engines)):
                return await self._without_files(request, model, view, engines, local.failure)
            job = _Job(pipeline, request, model, engines, where)
            prompt = await local.run(job, len(body.raw))
        except PromptError as error:
            raise NoTokens("tokenizer", str(error)) from None
        self._metrics.tokenised.labels(where).inc()
        return prompt

    def _distrusted(self, engines: Sequence[EngineView]) -> bool:
        assert self._parity is not None, "not started"
        return any(self._parity.disagrees(v) for v in engines)

    async def _without_files(
        self, request: PromptRequest, model: str, view: EngineView, engines: Sequence[EngineView], failure: str
    ) -> Prompt:
        if isinstance(request, TokenPrompt):
            if request.truncation is not None:
                raise NoTokens("tokenizer", f"truncation needs the tokenizer, but {failure}")
            return _prompt(TokenizedPrompt(request.token_ids), request, model, engines, where=Where.GIVEN)
        assert self._remote is not None, "not started"
        body = tokenize_body(request, model)
        found = await self._remote.ask(view, body, self._api_key(view))
        self._metrics.tokenised.labels(Where.REMOTE).inc()
        return _prompt(found, request, model, engines, where=Where.REMOTE)

    def _wanted(self, view: EngineView, model: str) -> tuple[str, ...]:
        names = [model, *sorted(view.models - {a.name for a in view.adapters})]
        given = next((self._files[n] for n in names if n in self._files), None)
        if given is not None:
            return (given,)
        return tuple(name for name in (self._default_files, view.root) if name)


class _Job:
    """Tokens and keys of one prompt, to be made in one go on one thread."""

    def __init__(
        self, pipeline: PromptPipeline, request: PromptRequest, model: str, engines: Sequence[EngineView], where: Where
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._model = model
        self._engines = engines
        self._where = where

    def __call__(self) -> Prompt:
        """Raises `PromptError`."""
        found = self._pipeline.tokenize(self._request)

        def keys_of(profile: HashProfile, extras: PromptExtras) -> Keys:
            return self._pipeline.keys(found, profile, extras)

        salt = self._request.facts.cache_salt
        return Prompt(
            token_ids=found.token_ids,
            keys=keys_by_profile(keys_of, self._model, salt, self._engines),
            complete=found.complete,
            comparable=not self._request.facts.incomparable,
            where=self._where,
        )


def _prompt(
    found: TokenizedPrompt, request: PromptRequest, model: str, engines: Sequence[EngineView], *, where: Where
) -> Prompt:
    """A prompt without a pipeline: nothing of it is kept for the next."""

    def keys_of(profile: HashProfile, extras: PromptExtras) -> Keys:
        return prompt_keys(profile, found.token_ids, extras)

    keys = keys_by_profile(keys_of, model, request.facts.cache_salt, engines)
    return Prompt(found.token_ids, keys, found.complete, not request.facts.incomparable, where)
