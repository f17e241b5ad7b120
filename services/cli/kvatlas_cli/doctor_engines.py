"""Engines looked at by the doctor itself: what they say, whether their ports answer, and their tokens.

The services see most of this too. Looked at from here it tells a service that cannot reach an engine from an engine
that is not there; and it can be looked at before there is any service.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from kvatlas_common.engines.asking import METRICS_ALL, AskFailed, ask, open_session
from kvatlas_common.engines.facts import EngineFacts
from kvatlas_common.engines.pages import MalformedPage, ServedModels, parse_metrics, parse_models, parse_version
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.findings import Code, Finding
from kvatlas_common.findings.engine import down, self_findings, version_of
from kvatlas_common.findings.hashing import Crowd, Hashing, hash_findings
from kvatlas_common.fleet import Health
from kvatlas_common.prompts import BadModelFiles, ModelFilesMissing, PromptPipeline, find_model_files
from kvatlas_indexer.adapters.replay_client import ReplayClient, ReplayOutcome
from kvatlas_indexer.adapters.zmq_sockets import new_context
from kvatlas_indexer.core import advice
from kvatlas_router.adapters.parity import Unchecked, tokens_here, tokens_there
from kvatlas_router.core.parity import SAMPLES, difference, judge

NEVER = (1 << 63) - 1
"""No publisher has come so far: a replay from there brings nothing but its end."""
ENGINES_AT_ONCE = 16
ZMTP_GREETING = (b"\xff", b"\x7f", 10)
"""First and last byte, and length, of the signature that a ZeroMQ socket sends to whoever connects (ZMTP 3)."""

Tokens = tuple[tuple[int, ...] | None, ...]


@dataclass(slots=True)
class Looked:
    """One engine as it was found. `tokens`: of every sample, None where they could not be had."""

    spec: EngineSpec
    facts: EngineFacts
    findings: list[Finding] = field(default_factory=list)
    tokens: Tokens | None = None

    @property
    def model(self) -> str:
        return min(self.facts.models - {adapter.name for adapter in self.facts.adapters}, default="")

    @property
    def up(self) -> bool:
        return self.facts.health is Health.READY


async def look_at(
    specs: Sequence[EngineSpec], *, files: str | None, timeout_s: float, environ: Mapping[str, str]
) -> list[Looked]:
    """`files`: of the model, a folder or hub name; None: where the engines say they are."""
    places, context = asyncio.Semaphore(ENGINES_AT_ONCE), new_context()
    try:
        async with open_session() as session:

            async def one(spec: EngineSpec) -> Looked:
                async with places:
                    return await _look(session, ReplayClient(context), spec, timeout_s)

            looked = list(await asyncio.gather(*map(one, specs)))
    finally:
        context.term()
    _compare_hashing(looked)
    _compare_tokens(looked, files, environ)
    return looked


async def _look(session: aiohttp.ClientSession, client: ReplayClient, spec: EngineSpec, timeout_s: float) -> Looked:
    async def page(path: str) -> bytes:
        return await ask(session, spec.url, path, api_key=spec.api_key, timeout_s=timeout_s)

    try:
        await page("/health")
    except AskFailed as failure:
        return Looked(spec, EngineFacts(spec.id, Health.DOWN), [down(str(failure))])
    problems: list[str] = []
    metrics, models, version = parse_metrics(b""), ServedModels(), None
    try:
        models = parse_models(await page("/v1/models"))
        metrics = parse_metrics(await page(METRICS_ALL))
    except (AskFailed, MalformedPage) as failure:
        problems.append(str(failure))
    with contextlib.suppress(AskFailed):
        version = parse_version(await page("/version"))
    facts = EngineFacts(
        spec.id,
        Health.READY,
        models.names,
        models.adapters,
        models.root,
        models.max_model_len,
        cache=metrics.cache,
        error="; ".join(problems),
        version=version,
        ranks_seen=metrics.ranks,
    )
    looked = Looked(spec, facts, self_findings(facts, ranks=spec.ranks))
    looked.findings += await _look_at_ports(client, spec, timeout_s)
    try:
        samples = [{"model": looked.model, **sample} for sample in SAMPLES]
        tokens = [await tokens_there(session, spec.url, body, spec.api_key) for body in samples]
        looked.tokens = tuple(tuple(found) if found is not None else None for found in tokens)
    except Unchecked as failure:
        wrong = f"its tokens cannot be compared: {failure}"
        looked.findings.append(Finding(Code.TOKENS_UNCHECKED, wrong, change="let it serve /tokenize, as vLLM does"))
    return looked


async def _look_at_ports(client: ReplayClient, spec: EngineSpec, timeout_s: float) -> list[Finding]:
    found: list[Finding] = []
    for engine in spec.ids:
        events, replay = spec.events_endpoint(engine.rank), spec.replay_endpoint(engine.rank)
        if events is not None and not await speaks_zeromq(events, timeout_s):
            found.append(advice.events_unreachable(events))
        if replay is not None:
            result = await client.replay(engine, replay, NEVER, lambda seq, payload: None)
            if result.outcome is not ReplayOutcome.COMPLETE:
                found.append(advice.replay_unreachable(replay, result.why or str(result.outcome)))
    return found


async def speaks_zeromq(endpoint: str, timeout_s: float) -> bool:
    """Whether a ZeroMQ socket answers there, by its greeting."""
    where = urlsplit(endpoint)
    if where.scheme != "tcp":
        return True  # not looked at
    first, last, length = ZMTP_GREETING
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            greeting = await reader.readexactly(length)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    finally:
        if writer is not None:
            writer.close()
    return greeting[:1] == first and greeting[-1:] == last


def _compare_hashing(looked: Iterable[Looked]) -> None:
    """Algorithm and block size, which engines say themselves, among those that serve the same model."""
    crowd, does = Crowd(), {str(one.spec.id): _hashing(one) for one in looked if one.up}
    for one in looked:
        if one.up:
            crowd.add(one.model, str(one.spec.id), does[str(one.spec.id)])
    for one in looked:
        if one.up:
            name = str(one.spec.id)
            peers, alike = crowd.peers(one.model, name, does[name])
            one.findings += hash_findings(does[name], peers=peers, alike=alike, version=version_of(one.facts.version))


def _hashing(one: Looked) -> Hashing:
    cache = one.facts.cache
    return Hashing(cache.prefix_caching_hash_algo, cache.hash_block_size or cache.block_size) if cache else Hashing()


def _compare_tokens(looked: Sequence[Looked], files: str | None, environ: Mapping[str, str]) -> None:
    """With those made here from the model's files, as most engines name them; where they are not here, with the tokens
    of most engines of the model."""
    for model in dict.fromkeys(one.model for one in looked if one.tokens is not None):
        of_model = [one for one in looked if one.model == model and one.tokens is not None]
        usual, _ = Counter(one.facts.root for one in of_model).most_common(1)[0]
        ours = _tokens_here(model, files or usual, environ)
        if ours is None and len(of_model) < 2:
            continue
        alike = [one.tokens for one in of_model if one.tokens is not None]
        wanted = ours or max(alike, key=alike.count)
        for one in of_model:
            assert one.tokens is not None
            pairs = enumerate(zip(wanted, one.tokens, strict=True), 1)
            if (finding := judge(model, one.facts.root, [difference(n, *pair) for n, pair in pairs])) is not None:
                one.findings.append(finding)


def _tokens_here(model: str, files: str | None, environ: Mapping[str, str]) -> Tokens | None:
    """None where the files are not here, or cannot be used."""
    try:
        pipeline = PromptPipeline.load(find_model_files(files or "", environ=environ))
        found = [tokens_here(pipeline, {"model": model, **sample}) for sample in SAMPLES]
    except (ModelFilesMissing, BadModelFiles, OSError, Unchecked):
        return None
    return tuple(tuple(tokens) if tokens is not None else None for tokens in found)
