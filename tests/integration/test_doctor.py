"""Set-ups with one thing wrong: the doctor, `/metrics` and the log of the services name it, its cause and its cure.

The engines are simulated, the services are a process of their own. As many things as do not hide each other are wrong
in one set-up. The doctor is run where it is asked, but for one test that runs the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvatlas_cli.__main__ import main
from kvatlas_loadtest.engine import TINY_MODEL, EngineConfig, SimulatedEngine
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.fault_kit import ask, chat, client, flags, metric, simulated
from tests.integration.processes import Router, router, until

GOOD = EngineConfig(time_model=NO_TIME, hash_algorithm="sha256_cbor", hash_seed="42")
CONFIGURED = ("--hash-seed", "42", "--prefix-caching-hash-algo", "sha256_cbor", "--block-size", "16")
ALTERED = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
LONG = "a prompt of many blocks " * 20


async def doctor(*options: str) -> tuple[int, str]:
    """Exit status, and what it writes."""

    def run() -> tuple[int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as written:
            return main(["doctor", *options]), written.getvalue()

    return await asyncio.to_thread(run)


async def command(*options: str) -> tuple[int, str]:
    """The same of a process."""
    words = [sys.executable, "-m", "kvatlas_cli", "doctor", *options]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


Wanted = Mapping[tuple[str, str], str]
"""Code and what it is about -> the change to make."""


@dataclass
class SetUp:
    """Indexer and router in one process, in front of simulated engines."""

    services: Router
    rest: str
    zmq: str
    session: aiohttp.ClientSession
    asked: int = 0

    async def work(self, *engines: SimulatedEngine, url: str = "") -> None:
        """A prompt nobody has seen, straight to each engine."""
        for engine in engines:
            self.asked += 1
            reply = await ask(self.session, url or engine.url, chat(f"{self.asked} {LONG}", max_tokens=2))
            assert not reply.error, reply

    async def until_heard(self, *engines: SimulatedEngine) -> None:
        """Works until the indexer has applied something of each that it dials, and not from a replay alone."""
        for engine in engines:
            await until(lambda engine=engine: engine.publisher().subscribed, "the indexer to subscribe")  # type: ignore[misc]

        async def look() -> bool:
            await self.work(*engines)
            async with self.session.get(f"{self.rest}/v1/engines") as reply:
                blocks = {engine["id"]: engine["blocks"] for engine in (await reply.json())["engines"]}
            return all(sum((blocks.get(engine.address) or {}).values()) for engine in engines)

        await until(look, "the indexer to have heard of every engine")

    async def findings(self, source: str = "indexer") -> dict[tuple[str, str], dict[str, Any]]:
        """By code and what they are about."""
        url = f"{self.rest}/v1/findings" if source == "indexer" else f"{self.services.admin}/debug/findings"
        async with self.session.get(url) as reply:
            return {(f["code"], f["about"]): f for f in (await reply.json())["findings"]}

    async def until_found(
        self, code: str, about: str, source: str = "indexer", busy: Sequence[SimulatedEngine] = ()
    ) -> dict[str, Any]:
        """`busy`: engines that have work all the while."""

        async def look() -> dict[str, Any] | None:
            await self.work(*busy)
            return (await self.findings(source)).get((code, about))

        await until(look, f"{code} about {about}")
        found = await look()
        assert found is not None
        return found

    async def until_gone(self, code: str, about: str, busy: Sequence[SimulatedEngine]) -> None:
        async def look() -> bool:
            await self.work(*busy)
            return (code, about) not in await self.findings()

        await until(look, f"{code} about {about} to be over")

    @property
    def flags(self) -> tuple[str, ...]:
        """Whom the doctor is to ask."""
        return "--indexer", self.rest, "--admin", self.services.admin

    async def doctor(self, *options: str) -> tuple[int, dict[str, Any]]:
        """Exit status, and what it says."""
        status, page = await doctor(*self.flags, "--json", *options)
        return status, json.loads(page)

    async def named_everywhere(self, wanted: Wanted, source: str = "indexer") -> None:
        """By the service itself, on /metrics, in the log, and by the doctor, with the change to make."""
        base = self.rest if source == "indexer" else self.services.admin
        for (code, about), change in wanted.items():
            found = await self.until_found(code, about, source)
            assert change in found["change"], found
            assert await metric(self.session, base, f"kvatlas_{source}_findings", code=code) >= 1
            await self.services.says(
                lambda line, code=code, about=about: line.get("event") == code and line["engine"] == about,  # type: ignore[misc]
                f"{code} of {about} in the log",
            )
        status, said = await self.doctor()
        assert status == 1
        told = {(f["code"], f["about"]): f["change"] for f in said["findings"]}
        assert {at: change in told.get(at, "") for at, change in wanted.items()} == dict.fromkeys(wanted, True)


@contextlib.asynccontextmanager
async def set_up(folder: Path, *options: str) -> AsyncIterator[SetUp]:
    ports = ("--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0", "--zmq-listen", "tcp://127.0.0.1:0")
    own = ("--model-files", f"tiny={TINY_MODEL}", "--lookup-deadline-ms", "5000")
    async with (
        client() as session,
        router(folder, "up", *ports, *own, *options, indexer="127.0.0.1:9", command="up") as services,
    ):
        ready = await services.says(lambda line: line.get("event") == "indexer ready", "readiness")
        yield SetUp(services, f"http://{ready['rest']}", ready["zmq"][0], session)
        services.assert_sound()


def dialled(engines: Sequence[SimulatedEngine], *, replay: bool = True) -> list[str]:
    return [flag for engine in engines for flag in flags(engine, replay=replay)]


WRONG = (
    (replace(GOOD, hash_seed="7"), "seed-differs", "PYTHONHASHSEED=42"),
    (replace(GOOD, hash_seed="no one knows it"), "seed-differs", "PYTHONHASHSEED=42"),
    (replace(GOOD, hash_algorithm="xxhash_cbor"), "algorithm-differs", "--prefix-caching-hash-algo sha256_cbor"),
    (replace(GOOD, limits=EngineLimits(block_size=32)), "block-size-differs", "--block-size 16"),
)
"""Engines that hash as no other does, what that is called, and how to start them."""


@pytest.mark.parametrize("configured", [CONFIGURED, ()], ids=["configured", "by-the-others"])
async def test_engines_that_hash_otherwise_are_named_each_with_its_own_cause(
    tmp_path: Path, configured: Sequence[str]
) -> None:
    async with (
        simulated(*(config for config, _, _ in WRONG), GOOD, GOOD) as engines,
        set_up(tmp_path, *configured, *dialled(engines)) as one,
    ):
        await one.until_heard(*engines)
        wanted = {
            (code, engine.address): f"start this engine with {change}"
            for engine, (_, code, change) in zip(engines, WRONG, strict=False)
        }
        await one.named_everywhere(wanted)
        assert {at for at, found in (await one.findings()).items() if found["severity"] != "advice"} == set(wanted)


async def test_settings_that_no_engine_has_are_the_configurations_fault_and_clear_with_it(tmp_path: Path) -> None:
    async with (
        simulated(replace(GOOD, hash_seed="7"), replace(GOOD, hash_seed="7")) as engines,
        set_up(tmp_path, "--hash-seed", "42", *dialled(engines)) as one,
    ):
        await one.until_heard(*engines)
        await one.named_everywhere({("seed-differs", engine.address): "set hashSeed: 7" for engine in engines})
        engines[0].config = replace(GOOD, hash_seed="42")
        await engines[0].restart()
        await one.until_gone("seed-differs", engines[0].address, busy=engines[:1])
        cleared = await one.services.says(lambda line: line.get("event") == "finding cleared", "the clearing")
        assert (cleared["code"], cleared["about"]) == ("seed-differs", engines[0].address)


async def test_a_changed_template_is_told_from_other_tokenizer_files(tmp_path: Path) -> None:
    altered, other = tmp_path / "altered", tmp_path / "other"
    for folder in (altered, other):
        shutil.copytree(TINY_MODEL, folder)
    (altered / "chat_template.jinja").write_text(ALTERED)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::2]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    configs = [replace(GOOD, model_path=path) for path in (altered, other, TINY_MODEL)]
    async with simulated(*configs) as engines, set_up(tmp_path, *dialled(engines)) as one:
        wanted = {
            ("template-differs", engines[0].address): "--chat-template",
            ("tokenizer-differs", engines[1].address): "--model-files tiny=",
        }
        await one.named_everywhere(wanted, "router")
        named = {about for code, about in await one.findings("router")}
        assert engines[2].address not in named
        _, said = await one.doctor("--model-files", str(TINY_MODEL), "--engine", engines[0].url)
        assert ("template-differs", engines[0].address) in {(f["code"], f["about"]) for f in said["findings"]}


async def test_events_that_are_cut_are_missed(tmp_path: Path) -> None:
    async with simulated(GOOD, GOOD) as engines, set_up(tmp_path, *dialled(engines)) as one:
        await one.until_heard(*engines)
        engines[0].publisher().faults.drop = 1_000_000
        await one.until_found("no-events", engines[0].address, busy=engines)
        await one.named_everywhere({("no-events", engines[0].address): "restart the engine"})
        assert ("no-events", engines[1].address) not in await one.findings()
        engines[0].publisher().faults.drop = 0
        await one.until_gone("no-events", engines[0].address, busy=engines[:1])


async def test_each_engine_is_told_why_its_events_are_not_heard_or_not_all_of_them(tmp_path: Path) -> None:
    silent = replace(GOOD, events_endpoint=None, replay_endpoint=None)
    async with (
        simulated(silent, silent, replace(GOOD, replay_endpoint=None), GOOD, GOOD) as engines,
        client() as asking,
    ):
        mute, unserved, without, behind, good = engines
        for number in range(3):
            await ask(asking, behind.url, chat(f"before {number} {LONG}", max_tokens=2))
        nowhere = f"{unserved.address},events=9,replay=9"
        listed = (mute.address, nowhere, f"{without.address},events={without.events_endpoint},replay=9")
        named = [word for spec in listed for word in ("--engine", spec)]
        async with set_up(tmp_path, *named, *flags(behind, replay=False), *flags(good)) as one:
            await one.until_found("not-heard-yet", mute.address)
            await one.until_found("replay-absent", behind.address)
            await one.until_heard(behind)
            await one.work(without)
            await one.until_found("no-events", mute.address, busy=(mute, good))
            wanted = {
                ("no-events", mute.address): f'"topic": "kv@{mute.address}@tiny"',
                ("events-unreachable", unserved.address): '"endpoint": "tcp://*:9"',
                ("replay-unreachable", unserved.address): '"replay_endpoint": "tcp://*:9"',
                ("replay-unreachable", without.address): '"replay_endpoint": "tcp://*:9"',
                ("replay-absent", behind.address): "replay=5558",
                ("inexact", behind.address): "POST /reset_prefix_cache",
            }
            await one.named_everywhere(wanted)
            assert not {code for code, about in await one.findings() if about == good.address}
            status, text = await doctor(*one.flags, "--engine", nowhere)
            assert status == 1
            assert all(code in text for code in ("error    events-unreachable", "warning  replay-unreachable"))
            async with one.session.post(f"{behind.url}/reset_prefix_cache") as reply:
                assert reply.status == 200
            await one.until_gone("inexact", behind.address, busy=[behind])


async def test_engines_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    """One that is listed and one that calls itself so; and two that connect, by their messages."""
    async with contextlib.AsyncExitStack() as stack:
        (owner,) = await stack.enter_async_context(simulated(GOOD))
        one = await stack.enter_async_context(set_up(tmp_path, *dialled([owner])))
        connecting = replace(GOOD, events_endpoint=one.zmq, replay_endpoint=None)
        claims = replace(connecting, topic=owner.topic)
        claimant, first = await stack.enter_async_context(simulated(claims, connecting))
        (second,) = await stack.enter_async_context(simulated(replace(connecting, topic=first.topic)))
        await one.until_found("name-claimed-twice", owner.address, busy=[claimant])
        await one.until_found("name-claimed-twice", first.address, busy=[first, second])
        wanted = {
            ("name-claimed-twice", owner.address): "kv@<its host:port>@<its model>",
            ("name-claimed-twice", first.address): '"topic" of its own',
        }
        await one.named_everywhere(wanted)


async def test_with_nothing_wrong_the_doctor_says_what_it_has_looked_at_and_whom_it_could_not_ask(
    tmp_path: Path,
) -> None:
    async with simulated(GOOD, GOOD) as engines, set_up(tmp_path, *CONFIGURED, *dialled(engines)) as one:
        await one.until_heard(*engines)
        await one.work(engines[0], url=one.services.url)
        named = [word for engine in engines for word in flags(engine)]
        status, said = await one.doctor(*named)
        assert (status, said["findings"]) == (0, [])
        assert len(said["asked"]) == 4
        again, text = await command(*one.flags, *named)
        assert again == 0
        assert "nothing is wrong" in text
        assert "chat template" in text
        assert await metric(one.session, one.rest, "kvatlas_indexer_findings") == 0

        status, said = await one.doctor("--indexer", "http://127.0.0.1:9")
        assert (status, list(said["not_asked"])) == (2, ["indexer http://127.0.0.1:9"])
        assert "nobody listens" in said["not_asked"]["indexer http://127.0.0.1:9"]


async def test_a_router_without_its_indexer_says_so_and_why_it_fails_open(tmp_path: Path) -> None:
    async with (
        simulated(GOOD) as (engine,),
        client() as session,
        router(tmp_path, "alone", "--engine", engine.address, indexer="127.0.0.1:9") as alone,
    ):
        one = SetUp(alone, "", "", session)
        for _ in range(8):
            await one.work(engine, url=alone.url)
        lost = await one.until_found("indexer-unreachable", "127.0.0.1:9", "router")
        assert "50051" in lost["cause"]
        failing = await one.until_found("failing-open", "", "router")
        assert "index-unavailable" in failing["wrong"]
        assert await metric(session, alone.admin, "kvatlas_router_findings", code="failing-open") == 1


async def test_engines_are_looked_at_before_there_is_any_service(tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(TINY_MODEL, altered)
    (altered / "chat_template.jinja").write_text(ALTERED)
    wrong = replace(GOOD, hash_algorithm="sha256", model_path=altered, data_parallel_size=2)
    async with simulated(wrong, GOOD, GOOD) as engines:
        named = [word for engine in engines for word in flags(engine)]
        status, page = await doctor("--indexer", "", "--admin", "", *named, "--engine", "127.0.0.1:9", "--json")
        said = json.loads(page)
        assert (status, said["not_asked"]) == (1, {})
        assert {(f["code"], f["about"]) for f in said["findings"]} == {
            ("engine-down", "127.0.0.1:9"),
            ("algorithm-differs", engines[0].address),
            ("template-differs", engines[0].address),
            ("ranks-not-listed", engines[0].address),
        }
