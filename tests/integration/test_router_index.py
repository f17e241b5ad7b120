"""The router and its indexers: what they say is used, and what they do not say costs no request."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from kvatlas_common.fleet import Health, Sync
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.observations import Finished, FirstToken, Outcome, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.wire import unpack_keys
from tests.integration.indexer_kit import PROFILE, ScriptedIndexer, never, ready, saying
from tests.integration.processes import DEADLINE_S
from tests.integration.router_kit import (
    NO_INDEXER,
    Running,
    Script,
    ScriptedEngine,
    Seen,
    answer,
    eventually,
    replying,
    routed,
    running,
)

IDS = list(range(100, 200))
TOKENS = {"model": "tiny", "prompt": IDS}  # needs no tokenizer: 6 blocks of 16 before the last token
USAGE = answer(b'{"usage":{"prompt_tokens":100,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":48}}}')
USUAL = replying(USAGE)
GENEROUS = ("--lookup-deadline-ms", "2000")  # where the deadline is not what is tested


@asynccontextmanager
async def fleet(
    indexer: ScriptedIndexer, *flags: str, script: Script = USUAL
) -> AsyncIterator[tuple[Running, str, str]]:
    """Two engines that only the indexer knows, and a router."""
    async with ScriptedEngine(script) as one, ScriptedEngine(script) as two, indexer:
        await indexer.tell(ready(one.address), ready(two.address))
        async with running("--indexer", indexer.address, *(flags or GENEROUS), ready=2) as run:
            yield run, one.address, two.address


async def test_the_engine_that_holds_most_is_chosen_and_the_prediction_is_told() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, two):
        indexer.match = saying((one, 3), (two, 5))
        _, headers, _ = await run.post("/v1/completions", TOKENS)
        assert headers["x-kvatlas-engine"] == two
        assert headers["x-kvatlas-cached-tokens"] == "80"
        assert headers["x-kvatlas-reason"] == "precise"
        (asked,) = indexer.asked
        assert (asked.model, [p.profile for p in asked.prompts]) == ("tiny", [PROFILE])
        assert len(unpack_keys(asked.prompts[0].keys)) == 6
        assert run.figure("lookups_total", result="ok") == 1


async def test_what_became_of_a_request_is_reported() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, _):
        indexer.match = saying((one, 5))
        await run.post("/v1/completions", TOKENS, {"x-request-id": "r-1"})
        await eventually(lambda: len(indexer.observed) == 2, "two facts: the first byte of such an answer is its end")
        routed, finished = indexer.observed
        assert isinstance(routed, Routed)
        assert (str(routed.engine), routed.prompt_tokens, routed.predicted_cached_tokens) == (one, 100, 80)
        assert list(routed.keys[PROFILE]) == unpack_keys(indexer.asked[0].prompts[0].keys).tolist()
        assert routed.silent_s > 0
        assert isinstance(finished, Finished)
        assert (finished.cached_tokens, finished.comparable, finished.outcome) == (48, True, Outcome.OK)
        assert {o.request_id for o in indexer.observed} == {"r-1"}
        assert run.figure("prediction_mismatches_total") == 1


async def test_of_a_stream_the_first_token_is_reported_too() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, _, _):
        await run.post("/v1/completions", TOKENS | {"stream": True})
        await eventually(lambda: len(indexer.observed) == 3, "three facts")
        routed, first, finished = indexer.observed
        assert isinstance(routed, Routed)
        assert routed.silent_s == 0
        assert isinstance(first, FirstToken)
        assert first.ttft_s > 0
        assert isinstance(finished, Finished)


async def test_where_a_request_was_sent_is_reported_before_it_is_answered() -> None:
    indexer, go_on = ScriptedIndexer(), asyncio.Event()

    async def when_told(_: Seen, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(answer(b"{}"))

    async with fleet(indexer, script=when_told) as (run, _, _):
        asking = asyncio.create_task(run.post("/v1/completions", TOKENS))
        await eventually(lambda: len(indexer.observed) == 1, "other routers are told soon")
        assert isinstance(indexer.observed[0], Routed)
        go_on.set()
        assert (await asking)[0] == 200
        await eventually(lambda: len(indexer.observed) == 2, "and once")


async def test_a_short_prompt_needs_no_lookup() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, _, _):
        _, headers, _ = await run.post("/v1/completions", {"model": "tiny", "prompt": IDS[:16]})
        assert (headers["x-kvatlas-reason"], headers["x-kvatlas-cached-tokens"]) == ("precise", "0")
        assert not indexer.asked


async def test_empty_is_a_prediction_and_unknown_is_none() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, two):
        _, headers, _ = await run.post("/v1/completions", TOKENS)
        assert (headers["x-kvatlas-reason"], headers["x-kvatlas-cached-tokens"]) == ("precise", "0")
        indexer.match = saying(unknown=(one, two))
        _, headers, _ = await run.post("/v1/completions", TOKENS)
        assert headers["x-kvatlas-reason"] == "estimate:unknown-engines"
        assert "x-kvatlas-cached-tokens" not in headers


async def lookups_are_streamed(indexer: ScriptedIndexer, run: Running) -> None:
    await eventually(lambda: all(s._stream.up for s in run.router.index._shards.values()), "a stream of lookups")


async def test_lookups_go_over_one_stream_and_its_loss_costs_no_request() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, _):
        indexer.match = saying((one, 5))
        await lookups_are_streamed(indexer, run)
        for _ in range(3):
            _, headers, _ = await run.post("/v1/completions", TOKENS)
            assert headers["x-kvatlas-reason"] == "precise"
        assert indexer.streamed == 1
        indexer.match = never
        asking = asyncio.create_task(run.post("/v1/completions", TOKENS))
        await eventually(lambda: len(indexer.asked) == 4, "a lookup that is not answered")
        await indexer.stop()
        _, headers, _ = await asking
        assert headers["x-kvatlas-reason"] == "affinity:index-unavailable"
        indexer.match = saying((one, 5))
        await indexer.start()
        await lookups_are_streamed(indexer, run)
        async with asyncio.timeout(DEADLINE_S):
            while (await run.post("/v1/completions", TOKENS))[1]["x-kvatlas-reason"] != "precise":
                pass


async def test_an_indexer_of_an_earlier_version_is_asked_call_by_call() -> None:
    indexer = ScriptedIndexer(streams=False)
    async with fleet(indexer) as (run, one, _):
        indexer.match = saying((one, 5))
        _, headers, _ = await run.post("/v1/completions", TOKENS)
        assert headers["x-kvatlas-reason"] == "precise"
        assert indexer.streamed == 0


async def failing(_: pb.MatchRequest) -> MatchAnswer:
    raise ValueError("an indexer with a defect")


@pytest.mark.parametrize(("how", "cause"), [(never, "deadline"), (failing, "index-error")])
async def test_a_lookup_that_fails_fails_no_request(how: object, cause: str) -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer, "--lookup-deadline-ms", "100") as (run, _, _):
        indexer.match = how  # type: ignore[assignment]
        for _ in range(20):
            status, headers, _ = await run.post("/v1/completions", TOKENS)
            assert status == 200
            assert headers["x-kvatlas-reason"] in (f"affinity:{cause}", "affinity:index-unavailable")
        assert run.figure("fail_open_total", cause=cause) >= 3
        assert len(indexer.asked) < 10, "an indexer that does not answer is left alone for a while"


async def test_a_hanging_indexer_costs_its_deadline_a_few_times_only() -> None:
    indexer = ScriptedIndexer(match=never)
    async with fleet(indexer, "--lookup-deadline-ms", "100") as (run, one, _):
        for _ in range(3):
            await run.post("/v1/completions", TOKENS)

        async def spared() -> bool:
            before = len(indexer.asked)
            _, headers, _ = await run.post("/v1/completions", TOKENS)
            return headers["x-kvatlas-reason"] == "affinity:index-unavailable" and len(indexer.asked) == before

        assert await spared() or await spared()  # so slow a machine that the first is the trial after a pause
        indexer.match = saying((one, 2))

        async def precise() -> bool:
            return (await run.post("/v1/completions", TOKENS))[1]["x-kvatlas-reason"] == "precise"

        async with asyncio.timeout(DEADLINE_S):
            while not await precise():
                await asyncio.sleep(0.05)


async def test_an_indexer_that_goes_and_comes_back() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, _):
        indexer.match = saying((one, 2))
        assert (await run.post("/v1/completions", TOKENS))[1]["x-kvatlas-reason"] == "precise"
        await indexer.stop()
        await eventually(lambda: not run.router.index.available, "lost")
        status, headers, _ = await run.post("/v1/completions", TOKENS)
        assert (status, headers["x-kvatlas-reason"]) == (200, "affinity:index-unavailable")
        await run.until(lambda f: all(v.health is Health.READY for v in f.engines.values()))
        assert len(run.router.fleet.fleet.engines) == 2, "probed by the router itself now"
        await indexer.start()
        await eventually(lambda: run.router.index.available, "back")
        assert (await run.post("/v1/completions", TOKENS))[1]["x-kvatlas-reason"] == "precise"


async def test_what_became_of_requests_while_an_indexer_was_away_is_told_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, _, _):
        for _ in range(3):  # streams that end leave nothing behind that takes what is to be told
            await indexer.stop()
            await eventually(lambda: not run.router.index.available, "lost")
            indexer.observed.clear()
            assert (await run.post("/v1/completions", TOKENS))[0] == 200
            await indexer.start()
            await eventually(lambda: Finished in map(type, indexer.observed), "its end to be told")
        gc.collect()
    assert "was destroyed" not in caplog.text


async def test_a_second_indexer_answers_for_one_that_hangs() -> None:
    hanging, well = ScriptedIndexer(match=never), ScriptedIndexer()
    async with fleet(hanging) as (_, one, two), well:
        await well.tell(ready(one), ready(two))
        well.match = saying((one, 4))
        both = ("--indexer", hanging.address, "--indexer", well.address, "--lookup-deadline-ms", "400")
        async with running(*both, ready=2) as run:
            await eventually(lambda: len(run.router.index.fleets()) == 2, "both up")
            for _ in range(6):
                _, headers, _ = await run.post("/v1/completions", TOKENS)
                assert (headers["x-kvatlas-reason"], headers["x-kvatlas-engine"]) == ("precise", one)
            await eventually(lambda: len(hanging.observed) == len(well.observed) == 12, "both are told everything")


async def test_the_fleet_follows_the_indexer() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, two):
        await indexer.tell(ready(one, health=Health.DOWN), ready(two))
        await run.until(lambda f: any(v.health is Health.DOWN for v in f.engines.values()))
        for _ in range(4):
            assert (await run.post("/v1/completions", TOKENS))[1]["x-kvatlas-engine"] == two


async def test_a_router_that_starts_with_every_indexer_down_knows_its_last_fleet(tmp_path: Path) -> None:
    indexer = ScriptedIndexer()
    async with ScriptedEngine(replying(USAGE)) as engine:
        async with indexer:
            await indexer.tell(ready(engine.address, sync=Sync.EXACT))
            flags = ("--indexer", indexer.address, "--state-dir", str(tmp_path))
            async with running(*flags, ready=1):
                await eventually((tmp_path / "fleet.json").exists, "saved")
        async with running(*NO_INDEXER, "--state-dir", str(tmp_path), ready=1) as run:
            status, headers, _ = await run.post("/v1/completions", TOKENS)
            assert (status, headers["x-kvatlas-engine"]) == (200, engine.address)
            assert headers["x-kvatlas-reason"] == "affinity:index-unavailable"


async def test_a_broken_state_file_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_bytes(b"[{nonsense")
    async with ScriptedEngine() as engine:
        flags = ("--engine", engine.address, *NO_INDEXER, "--state-dir", str(tmp_path))
        async with running(*flags, ready=1) as run:
            assert (await run.post())[0] == 200


async def test_what_speaks_no_grpc_at_the_indexers_port_hurts_nobody() -> None:
    async with ScriptedEngine() as impostor, routed(ScriptedEngine(), flags=("--indexer", impostor.address)) as run:
        assert (await run.post())[1]["x-kvatlas-reason"] == "affinity:index-unavailable"


async def test_a_decision_is_explained_in_full() -> None:
    indexer = ScriptedIndexer()
    async with fleet(indexer) as (run, one, two):
        indexer.match = saying((one, 3), (two, 5))
        async with run.http.post(run.admin_url + "/debug/route", json=TOKENS) as reply:
            said = json.loads(await reply.text())
        assert (said["engine"], said["reason"], said["prompt_tokens"]) == (two, "precise", 100)
        assert said["token_ids"] == IDS
        assert len(said["keys"][PROFILE]) == 6
        weighed = {
            e["engine"]: (e["matched_blocks"], e["cached_tokens"], e["tokens_to_compute"]) for e in said["engines"]
        }
        assert weighed == {two: (5, 80, 20), one: (3, 48, 52)}
        assert [e["cost_ms"] for e in said["engines"]] == sorted(e["cost_ms"] for e in said["engines"])
        assert set(said["engines"][0]["cost"]) == {"queue_ms", "compute_ms", "transfer_ms", "decode_ms", "others_ms"}


async def test_a_model_the_index_does_not_know_goes_by_affinity() -> None:
    class Strict(ScriptedIndexer):
        async def Match(self, request: pb.MatchRequest, context: grpc.aio.ServicerContext[object, object]) -> None:  # type: ignore[override]
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")

    async with fleet(Strict(streams=False)) as (run, _, _):
        status, headers, _ = await run.post("/v1/completions", TOKENS)
        assert (status, headers["x-kvatlas-reason"]) == (200, "affinity:unknown-model")
