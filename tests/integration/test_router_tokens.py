"""Tokens made here are checked against the engines' own; where they differ or cannot be made, an engine makes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.words import EngineId
from kvatlas_loadtest.engine import TINY_MODEL, EngineConfig, SimulatedEngine
from tests.integration.engine_kit import simulated_engine
from tests.integration.indexer_kit import PROFILE, ScriptedIndexer
from tests.integration.router_kit import CHAT, Running, eventually, running

ALTERED = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"


def told(engine: SimulatedEngine, root: str) -> EngineView:
    return EngineView(
        EngineId.parse(engine.address),
        f"http://{engine.address}",
        models=frozenset({"tiny"}),
        root=root,
        health=Health.READY,
        profile=PROFILE,
        block_size=16,
    )


@asynccontextmanager
async def fleet(root: str, *flags: str) -> AsyncIterator[tuple[Running, SimulatedEngine]]:
    async with simulated_engine(EngineConfig()) as engine, ScriptedIndexer() as indexer:
        await indexer.tell(told(engine, root))
        generous = ("--lookup-deadline-ms", "2000", "--remote-tokenize-timeout-s", "10")
        async with running("--indexer", indexer.address, *generous, *flags, ready=1) as run:
            yield run, engine


async def explained(run: Running) -> dict[str, object]:
    async with run.http.post(run.admin_url + "/debug/route", json=CHAT) as reply:
        said: dict[str, object] = json.loads(await reply.read())
        return said


async def test_with_the_engines_files_tokens_are_made_here_and_agree() -> None:
    async with fleet(str(TINY_MODEL)) as (run, engine):
        await eventually(lambda: run.router.tokenizers.checked(engine.address), "checked")
        here = await explained(run)
        assert here["tokenised"] == "local"
        async with run.http.post(f"http://{engine.address}/tokenize", json=CHAT) as reply:
            assert (await reply.json())["tokens"] == here["token_ids"]
        assert run.figure("parity_mismatches_total", model="tiny") == 0


async def test_without_files_an_engine_makes_them() -> None:
    async with fleet("/nowhere/at/all") as (run, _):
        there = await explained(run)
        assert (there["tokenised"], there["reason"]) == ("remote", "precise")
        assert (await explained(run))["token_ids"] == there["token_ids"]


async def test_a_wrong_template_is_noticed_named_and_not_used(tmp_path: Path) -> None:
    copy = tmp_path / "altered"
    shutil.copytree(TINY_MODEL, copy)
    (copy / "chat_template.jinja").write_text(ALTERED)
    flags = ("--model-files", f"tiny={copy}", "--parity-interval-s", "0.2")
    async with fleet(str(TINY_MODEL), *flags) as (run, engine):
        await eventually(lambda: run.figure("parity_mismatches_total", model="tiny") > 0, "noticed")
        assert run.router.tokenizers.checked(engine.address)
        said = await explained(run)
        assert said["tokenised"] == "remote"
        async with run.http.post(f"http://{engine.address}/tokenize", json=CHAT) as reply:
            assert (await reply.json())["tokens"] == said["token_ids"]


async def test_what_cannot_be_rendered_goes_by_affinity_and_says_so() -> None:
    async with fleet(str(TINY_MODEL)) as (run, _):
        _, headers, _ = await run.post("/v1/messages", {"model": "tiny", "messages": [], "max_tokens": 1})
        assert headers["x-kvatlas-reason"].startswith("affinity:unrenderable:")
        own = CHAT | {"chat_template": "{{ messages }}"}
        _, headers, _ = await run.post(body=own)
        assert headers["x-kvatlas-reason"].startswith("affinity:unrenderable:")
