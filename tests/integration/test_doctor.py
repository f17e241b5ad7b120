"""Set-ups with one thing wrong: the doctor, `/metrics` and the log of the services name it, its cause and its cure.

The engines are simulated, the services and the doctor are processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

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
    command = [sys.executable, "-m", "kvatlas_cli", "doctor", *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


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

    async def until_gone(self, code: str, about: str) -> None:
        async def look() -> bool:
            return (code, about) not in await self.findings()

        await until(look, f"{code} about {about} to be over")

    async def doctor(self, *options: str) -> tuple[int, dict[str, Any]]:
        """Exit status, and what it says."""
        status, page = await self.told("--json", *options)
        return status, json.loads(page)

    async def told(self, *options: str) -> tuple[int, str]:
        """Exit status, and what it writes."""
        return await doctor("--indexer", self.rest, "--admin", self.services.admin, *options)

    async def named_everywhere(self, code: str, about: str, change: str, source: str = "indexer") -> None:
        """By the service itself, on /metrics, in the log, and by the doctor, with the change to make."""
        found = await self.until_found(code, about, source)
        assert change in found["change"], found
        base = self.rest if source == "indexer" else self.services.admin
        assert await metric(self.session, base, f"kvatlas_{source}_findings", code=code) >= 1
        await self.services.says(
            lambda line: line.get("event") == code and line["engine"] == about, f"{code} of {about} in the log"
        )
        status, said = await self.doctor()
        assert status == 1
        about_it = [f for f in said["findings"] if (f["code"], f["about"]) == (code, about)]
        assert [change in f["change"] for f in about_it] == [True]


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


@pytest.mark.parametrize("configured", [CONFIGURED, ()], ids=["configured", "by-the-others"])
@pytest.mark.parametrize(
    ("wrong", "code", "change"),
    [
        (replace(GOOD, hash_seed="7"), "seed-differs", "PYTHONHASHSEED=42"),
        (replace(GOOD, hash_seed="no one knows it"), "seed-differs", "PYTHONHASHSEED=42"),
        (
            replace(GOOD, hash_algorithm="xxhash_cbor"),
            "algorithm-differs",
            "--prefix-caching-hash-algo sha256_cbor",
        ),
        (replace(GOOD, limits=EngineLimits(block_size=32)), "block-size-differs", "--block-size 16"),
    ],
    ids=["seed", "unknown-seed", "algorithm", "block-size"],
)
async def test_one_engine_that_hashes_otherwise_is_named(
    tmp_path: Path, configured: Sequence[str], wrong: EngineConfig, code: str, change: str
) -> None:
    async with simulated(wrong, GOOD, GOOD) as engines, set_up(tmp_path, *configured, *dialled(engines)) as one:
        await one.work(*engines)
        await one.named_everywhere(code, engines[0].address, f"start this engine with {change}")
        wanted = {(code, engines[0].address)}
        assert {at for at, found in (await one.findings()).items() if found["severity"] != "advice"} == wanted


async def test_settings_that_no_engine_has_are_the_configurations_fault_and_clear_with_it(tmp_path: Path) -> None:
    async with (
        simulated(replace(GOOD, hash_seed="7"), replace(GOOD, hash_seed="7")) as engines,
        set_up(tmp_path, "--hash-seed", "42", *dialled(engines)) as one,
    ):
        await one.work(*engines)
        for engine in engines:
            await one.named_everywhere("seed-differs", engine.address, "set hashSeed: 7")
        engines[0].config = replace(GOOD, hash_seed="42")
        await engines[0].restart()
        await one.work(engines[0])
        await one.until_gone("seed-differs", engines[0].address)
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
    async with contextlib.AsyncExitStack() as stack:
        paths = (altered, other, TINY_MODEL)
        engines = [await stack.enter_async_context(SimulatedEngine(replace(GOOD, model_path=path))) for path in paths]
        one = await stack.enter_async_context(set_up(tmp_path, *dialled(engines)))
        await one.named_everywhere("template-differs", engines[0].address, "--chat-template", "router")
        await one.named_everywhere("tokenizer-differs", engines[1].address, "--model-files tiny=", "router")
        named = {about for code, about in await one.findings("router")}
        assert engines[2].address not in named
        _, said = await one.doctor("--model-files", str(TINY_MODEL), "--engine", engines[0].url)
        assert ("template-differs", engines[0].address) in {(f["code"], f["about"]) for f in said["findings"]}


async def test_events_that_are_cut_are_missed(tmp_path: Path) -> None:
    async with simulated(GOOD, GOOD) as engines, set_up(tmp_path, *dialled(engines)) as one:
        await one.work(*engines)
        engines[0].publisher().faults.drop = 1_000_000
        await one.until_found("no-events", engines[0].address, busy=engines)
        await one.named_everywhere("no-events", engines[0].address, "restart the engine")
        assert ("no-events", engines[1].address) not in await one.findings()
        engines[0].publisher().faults.drop = 0
        await one.work(engines[0])
        await one.until_gone("no-events", engines[0].address)


async def test_an_engine_that_never_publishes_is_told_how_to(tmp_path: Path) -> None:
    mute = replace(GOOD, events_endpoint=None, replay_endpoint=None)
    async with simulated(mute, GOOD) as engines:
        listed = ["--engine", engines[0].address, *flags(engines[1])]
        async with set_up(tmp_path, *listed) as one:
            await one.until_found("not-heard-yet", engines[0].address)
            await one.until_found("no-events", engines[0].address, busy=engines)
            await one.named_everywhere("no-events", engines[0].address, f'"topic": "kv@{engines[0].address}@tiny"')


async def test_an_event_port_that_nobody_serves_is_found_by_the_indexer_and_by_the_doctor(tmp_path: Path) -> None:
    mute = replace(GOOD, events_endpoint=None, replay_endpoint=None)
    async with simulated(mute) as (engine,):
        spec = f"{engine.address},events=9,replay=9"
        async with set_up(tmp_path, "--engine", spec) as one:
            await one.named_everywhere("events-unreachable", engine.address, '"endpoint": "tcp://*:9"')
            await one.named_everywhere("replay-unreachable", engine.address, '"replay_endpoint": "tcp://*:9"')
            status, text = await one.told("--engine", spec)
            assert status == 1
            assert all(code in text for code in ("error    events-unreachable", "warning  replay-unreachable"))


async def test_without_a_replay_what_was_missed_stays_missed(tmp_path: Path) -> None:
    async with simulated(GOOD) as (engine,):
        for number in range(3):
            async with client() as session:
                await ask(session, engine.url, chat(f"before {number} {LONG}", max_tokens=2))
        async with set_up(tmp_path, *dialled([engine], replay=False)) as one:
            await one.until_found("replay-absent", engine.address)
            await one.work(engine)
            await one.named_everywhere("inexact", engine.address, "POST /reset_prefix_cache")
            absent = await one.until_found("replay-absent", engine.address)
            assert "replay=5558" in absent["change"]
            async with one.session.post(f"{engine.url}/reset_prefix_cache") as reply:
                assert reply.status == 200
            await one.work(engine)
            await one.until_gone("inexact", engine.address)


async def test_a_replay_that_is_turned_off_is_named(tmp_path: Path) -> None:
    async with simulated(replace(GOOD, replay_endpoint=None)) as (engine,):
        listed = f"{engine.address},events={engine.events_endpoint},replay=9"
        async with set_up(tmp_path, "--engine", listed) as one:
            await one.work(engine)
            await one.named_everywhere("replay-unreachable", engine.address, '"replay_endpoint": "tcp://*:9"')


async def test_two_engines_with_one_name_are_told_apart(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        (owner,) = await stack.enter_async_context(simulated(GOOD))
        one = await stack.enter_async_context(set_up(tmp_path, *dialled([owner])))
        claims = replace(GOOD, events_endpoint=one.zmq, replay_endpoint=None, topic=owner.topic)
        (claimant,) = await stack.enter_async_context(simulated(claims))

        async def refused() -> bool:
            await one.work(claimant)
            return ("name-claimed-twice", owner.address) in await one.findings()

        await until(refused, "the claim to be refused")
        await one.named_everywhere("name-claimed-twice", owner.address, "kv@<its host:port>@<its model>")


async def test_two_publishers_of_one_topic_are_told_by_their_messages(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(set_up(tmp_path))
        connecting = replace(GOOD, events_endpoint=one.zmq, replay_endpoint=None)
        (first,) = await stack.enter_async_context(simulated(connecting))
        (second,) = await stack.enter_async_context(simulated(replace(connecting, topic=first.topic)))

        async def clash() -> bool:
            await one.work(first, second)
            return ("name-claimed-twice", first.address) in await one.findings()

        await until(clash, "the clash to be seen")
        await one.named_everywhere("name-claimed-twice", first.address, '"topic" of its own')


async def test_with_nothing_wrong_the_doctor_says_what_it_has_looked_at(tmp_path: Path) -> None:
    async with simulated(GOOD, GOOD) as engines, set_up(tmp_path, *CONFIGURED, *dialled(engines)) as one:
        await one.work(*engines * 4)
        await one.work(engines[0], url=one.services.url)
        named = [word for engine in engines for word in flags(engine)]
        status, said = await one.doctor(*named)
        assert (status, said["findings"]) == (0, [])
        assert len(said["asked"]) == 4
        again, text = await one.told(*named)
        assert again == 0
        assert "nothing is wrong" in text
        assert "chat template" in text
        assert await metric(one.session, one.rest, "kvatlas_indexer_findings") == 0


async def test_a_service_that_cannot_be_asked_is_told_from_nothing_wrong(tmp_path: Path) -> None:
    async with simulated(GOOD) as (engine,), set_up(tmp_path, *dialled([engine])) as one:
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
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimulatedEngine(config)) for config in (wrong, GOOD, GOOD)]
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
