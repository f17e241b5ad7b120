"""One recording: begins where the engine's cache is known, then takes requests one at a time, each with its events.

One at a time, because only then is it certain what the engine's cache held when a request met it: the next request is
sent when every message of the last one has come. A request that cannot be compared all the same (its prompt or its
cached tokens are not known) is recorded as `concurrent`, which an audit applies but does not hold to the index.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from kvatlas_cli.record_answers import RECORDED, Answer, Request, incomparable
from kvatlas_cli.record_engine import RecordedEngine, RecordFailed
from kvatlas_cli.record_events import EventLog, Mark, Patience
from kvatlas_cli.record_files import CaptureWriter
from kvatlas_cli.record_workload import EngineTraits
from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.prompts.requests import COMPLETIONS
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.replay_client import ReplayClient, ReplayOutcome
from kvatlas_loadtest.texts import WORDS

PROBE_WORDS = 600  # where the engine does not tell its block size
PROBES = 3
UNSETTLED_IN_A_ROW = 3


@dataclass(slots=True)
class Tally:
    """What has been recorded. `left_out`: why requests are not comparable; `failed`: HTTP statuses not recorded."""

    requests: int = 0
    comparable: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    unsettled: int = 0
    retokenised: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Clocks:
    """`now`: seconds since the epoch. `chance` makes texts that no engine has seen."""

    now: Callable[[], float]
    chance: random.Random


class Recorder:
    """`warn(text)` is called for whatever makes the capture less than it could be, once each."""

    def __init__(
        self,
        engine: RecordedEngine,
        log: EventLog,
        files: CaptureWriter,
        *,
        clocks: Clocks,
        warn: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        self.tally = Tally()
        self.log = log
        self._engine = engine
        self._files = files
        self._clocks = clocks
        self._warn = warn
        self._patience = patience or Patience()
        self._turn = asyncio.Lock()
        self._block_size = 0
        self._says_cached = False
        self._unsettled_in_a_row = 0

    async def begin(self, replay: ReplayClient | None, *, reset: bool) -> EngineTraits:
        """Waits until events come in, from every rank. Raises `RecordFailed` when they do not."""
        page, served = await self._engine.models()
        self._files.models(page)
        cache = await self._look_at_metrics()
        self._block_size = cache.block_size or 0
        base = sorted(served.names - {adapter.name for adapter in served.adapters})
        if not base:
            raise RecordFailed(f"engine {self._engine.spec.url} serves no model")
        if reset:
            await self._engine.reset_cache()
        reports = [await self._probe(base[0], rank) for rank in range(self._engine.spec.ranks)]
        self._says_cached = all(reports)
        self.log.begin(await self._history(replay))
        if reset and not self.log.heard.clears:
            self._warn("--reset: the engine did not publish that its cache was emptied: requests may have been running")
        models = [base[0], *(adapter.name for adapter in served.adapters)]
        length = served.max_model_len or 4096
        return EngineTraits(models, self._engine.spec.ranks, self._block_size or 64, length)

    async def take(self, request: Request, exchange: Callable[[], Awaitable[Answer]]) -> Answer:
        """`exchange` sends the request and reads its answer; it runs alone. Returns once the events are in."""
        async with self._turn:
            before, sent_at = self.log.mark(), self._clocks.now()
            answer = await exchange()
            done_at = self._clocks.now()
            if answer.status != 200:
                self.tally.failed[answer.status] += 1
                await self.log.until_settled(before, 0, self._patience)
                return answer
            tokens, why_not = await self._compared(request, answer)
            await self._settle(before, answer, tokens)
            if request.path in RECORDED:
                line = _line(self.tally.requests, request, answer, tokens, why_not)
                self._files.request({**line, "t_send": sent_at, "t_done": done_at, "events_before": before.count})
                self._count(answer, tokens, why_not)
            return answer

    async def ask(self, request: Request) -> Answer:
        """Takes a request of our own."""
        return await self.take(request, lambda: self._engine.complete(request))

    async def alone(self, exchange: Callable[[], Awaitable[Answer]]) -> None:
        """Something that may change the cache, but is no request to record."""
        async with self._turn:
            before = self.log.mark()
            await exchange()
            await self.log.until_settled(before, 0, self._patience)

    async def end(self) -> None:
        """The engine's figures after all of it, where it still gives them."""
        await self._look_at_metrics(at_start=False)

    async def _look_at_metrics(self, at_start: bool = True) -> CacheConfig:
        page, cache, running = await self._engine.metrics()
        if page:
            self._files.metrics(page)
        if at_start and running:
            self._warn(f"the engine is busy with {running} other requests: nobody else may use it while it is recorded")
        return cache

    async def _probe(self, model: str, rank: int) -> bool:
        """Has the engine publish something, until it is heard. Whether the engine reports cached tokens.

        It is asked the same twice, because some versions (vLLM 0.10) leave `cached_tokens` out where there are none.
        """
        spec, pinned = self._engine.spec, rank if self._engine.spec.ranks > 1 else None
        words = 2 * self._block_size + 8 if self._block_size else PROBE_WORDS
        for _ in range(PROBES):
            text = " ".join(self._clocks.chance.choices(WORDS, k=words))
            body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
            before = self.log.mark()
            answer = await self._engine.complete(Request(COMPLETIONS, body, pinned))
            if answer.status != 200:
                raise RecordFailed(f"engine {spec.url} answered {answer.status} to a plain completion")
            if await self.log.until_heard_of(rank, self._patience.first_s):
                break
        else:
            raise RecordFailed(_nothing_heard(spec.events, rank))
        if self.log.heard.foreign:
            raise RecordFailed("several engines publish here, by different topics: name one of them with --topic")
        await self._settle(before, answer, answer.prompt_token_ids)
        again = await self._engine.complete(Request(COMPLETIONS, body, pinned))
        await self.log.until_settled(self.log.mark(), 0, self._patience)
        if again.cached_tokens is None:
            self._warn(
                "the engine does not report cached tokens: start it with --enable-prompt-tokens-details. "
                "Nothing of this capture can be compared"
            )
        elif again.cached_tokens == 0:
            self._warn("the same prompt twice, and nothing was served from the cache: is prefix caching on?")
        return again.cached_tokens is not None

    async def _history(self, replay: ReplayClient | None) -> list[list[bytes]]:
        """The messages before the first one heard, where they can be had; says so where they cannot."""
        history: list[list[bytes]] = []
        heard, spec = self.log.heard, self._engine.spec
        for rank, first in sorted(heard.first.items()):
            if first == 0 or heard.clears:
                continue
            fetched: list[list[bytes]] = []
            endpoint = spec.replay_endpoint(rank)
            if replay is not None and endpoint is not None:
                fetched = await _replayed(replay, EngineId(spec.address, rank), endpoint, first, heard.topic or b"")
            if len(fetched) != first:
                self._warn(
                    f"the engine had published {first} messages before (rank {rank}), of which {len(fetched)} could be "
                    "fetched: what its cache held is not wholly known. Give --replay, or --reset, or restart it"
                )
            history += fetched
        return history

    async def _compared(self, request: Request, answer: Answer) -> tuple[list[int] | None, str]:
        """The prompt's token ids, and why the request cannot be compared, if so."""
        why_not = incomparable(request)
        tokens = answer.prompt_token_ids
        if not why_not:
            said = await self._engine.prompt_token_ids(request)
            if said is not None and tokens is not None and said != tokens:
                self.tally.retokenised += 1
            tokens = tokens if tokens is not None else said
        if why_not:
            return tokens, why_not
        if tokens is None:
            return None, "the prompt's tokens are not known"
        if answer.prompt_tokens not in (None, len(tokens)):
            return tokens, "the engine counts other prompt tokens"
        if not answer.says_usage:
            return tokens, "its answer has no usage (a stream needs stream_options.include_usage)"
        if answer.cached_tokens is None and not self._says_cached:
            return tokens, "the engine does not report cached tokens"
        if request.rank is None and self._engine.spec.ranks > 1:
            return tokens, "not pinned to a rank (X-data-parallel-rank)"
        return tokens, ""

    async def _settle(self, before: Mark, answer: Answer, tokens: list[int] | None) -> None:
        """The last sampled token is never computed: no block is whole because of it."""
        due, known = 0, answer.says_usage and (answer.cached_tokens is not None or self._says_cached)
        if self._block_size and tokens and known and self._unsettled_in_a_row < UNSETTLED_IN_A_ROW:
            computed = len(tokens) + (answer.completion_tokens or 1) - 1
            due = computed // self._block_size * self._block_size - (answer.cached_tokens or 0)
        if await self.log.until_settled(before, max(due, 0), self._patience):
            self._unsettled_in_a_row = 0 if due > 0 else self._unsettled_in_a_row
            return
        self.tally.unsettled += 1
        self._unsettled_in_a_row += 1
        if self._unsettled_in_a_row == UNSETTLED_IN_A_ROW:
            self._warn(
                "the engine stores less than whole blocks of what it computes, or others use it too: from now on its "
                "events are taken to be in when it falls silent"
            )

    def _count(self, answer: Answer, tokens: list[int] | None, why_not: str) -> None:
        self.tally.requests += 1
        if why_not:
            self.tally.left_out[why_not] += 1
            return
        self.tally.comparable += 1
        self.tally.cached_tokens += answer.cached_tokens or 0
        self.tally.prompt_tokens += len(tokens or ())


def _line(number: int, request: Request, answer: Answer, tokens: list[int] | None, why_not: str) -> dict[str, Any]:
    line: dict[str, Any] = {
        "i": number,
        "path": request.path,
        "body": dict(request.body),
        "prompt_token_ids": tokens or [],
        "output_token_ids": answer.output_token_ids,
        "prompt_tokens": answer.prompt_tokens if answer.prompt_tokens is not None else len(tokens or ()),
        "completion_tokens": answer.completion_tokens,
        "cached_tokens": answer.cached_tokens or 0,
    }
    if request.rank is not None:
        line["data_parallel_rank"] = request.rank
    if why_not:
        line |= {"concurrent": True, "not_comparable": why_not}
    return line


async def _replayed(
    client: ReplayClient, engine: EngineId, endpoint: str, before: int, topic: bytes
) -> list[list[bytes]]:
    """The messages 0 to `before` - 1, as far as the engine remembers them, in the frames they were published in."""
    batches: dict[int, list[bytes]] = {}

    def keep(seq: int, payload: bytes) -> None:
        if seq < before:
            batches[seq] = [topic, seq.to_bytes(8, "big"), payload]

    end = await client.replay(engine, endpoint, 0, keep)
    if end.outcome is ReplayOutcome.REFUSED:
        raise RecordFailed(f"--replay {endpoint}: {end.why}. Is it the engine's replay_endpoint?")
    return [batches[seq] for seq in sorted(batches)]


def _nothing_heard(endpoint: str | None, rank: int) -> str:
    where = f"from {endpoint}" if endpoint else "on --zmq-listen"
    ranked = f" of rank {rank}" if rank else ""
    return (
        f"no KV event{ranked} came {where} after {PROBES} requests that fill whole blocks. Is the engine served with "
        '--kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": ...}\', is that '
        "endpoint the one named here (rank N: port + N), and is prefix caching on?"
    )
