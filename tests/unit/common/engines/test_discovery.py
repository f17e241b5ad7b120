"""Sources of the wanted set, with a resolver and files of the test's own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from kvatlas_common.engines.discovery import BrokenList, Engines, FileLook, NameLook, parse_engine_list, watch
from kvatlas_common.engines.specs import DnsName, EngineDefaults, parse_engine, parse_source

SOON_S = 0.005


def engines(*written: str) -> Engines:
    return frozenset(parse_engine(text) for text in written)


def dns(written: str) -> DnsName:
    source = parse_source(written)
    assert isinstance(source, DnsName)
    return source


class Names:
    """A name server: `answers` are addresses, or an error to raise."""

    def __init__(self, answers: Mapping[str, frozenset[str] | OSError]) -> None:
        self.answers = dict(answers)
        self.asked = asyncio.Event()

    async def resolve(self, host: str, port: int) -> frozenset[str]:
        self.asked.set()
        answer = self.answers[host]
        if isinstance(answer, OSError):
            raise answer
        return answer


@asynccontextmanager
async def watching(*written: str, names: Names | None = None) -> AsyncIterator[AsyncIterator[Engines]]:
    sources = [parse_source(text) for text in written]
    resolve = (names or Names({})).resolve
    async with aclosing(watch(sources, refresh_s=SOON_S, resolve=resolve)) as found, asyncio.timeout(30):
        yield found


@pytest.mark.parametrize(
    "text", ["- a:1\n- {url: 'http://b:2', ranks: 2}\n", json.dumps({"engines": ["a:1", {"url": "b:2", "ranks": 2}]})]
)
def test_a_list_is_yaml_or_json(text: str) -> None:
    assert parse_engine_list(text) == engines("a:1", "b:2,ranks=2")


def test_a_list_takes_defaults_and_keys() -> None:
    (spec,) = parse_engine_list("[{address: a, apiKeyEnv: KEY}]", EngineDefaults(9000, 5557), {"KEY": "0123"})
    assert (spec.address, spec.events) == ("a:9000", "tcp://a:5557")
    assert spec.api_key is not None
    assert spec.api_key.get_secret_value() == "0123"
    (spec,) = parse_engine_list("[{address: a, apiKey: 0123}]")
    assert spec.api_key is not None
    assert spec.api_key.get_secret_value() == "0123"  # not the 83 of YAML's octal numbers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"empty; for no engines write \[\]"),
        ("engines:", "empty"),
        ("7", "no list"),
        ("a: b", "no list"),
        ("[a:1", "expected"),
        ("[a:1, b c:2, 'd:1,rank=2']", "engine 2: .*; engine 3: .*did you mean ranks"),
        ("[a:1, a:1]", "listed twice"),
        ("[file:x]", "not dns: or file:"),
        ("[" * 5000, "."),
    ],
)
def test_a_broken_list_says_every_reason(text: str, says: str) -> None:
    with pytest.raises(BrokenList, match=says):
        parse_engine_list(text)


async def test_a_file_is_read_when_it_changes_and_keeps_its_last_good_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "engines.yaml"
    look = FileLook(path)
    assert await look.look() is None
    assert await look.look() is None
    path.write_text("[a:1]")
    assert await look.look() == engines("a:1")
    assert await look.look() is None
    path.write_text("[a:1, b:")
    assert await look.look() is None
    assert await look.look() is None
    path.write_text("[b:2]")
    assert await look.look() == engines("b:2")
    complaints = [record.__dict__["why"] for record in caplog.records if record.levelno == logging.WARNING]
    assert len(complaints) == 2  # each reason once
    assert "No such file" in complaints[0]


async def test_a_config_map_changes_by_swapping_a_link(tmp_path: Path) -> None:
    for version, text in (("..v1", "[a:1]"), ("..v2", "[b:1]")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "engines.yaml").write_text(text)
        os.utime(tmp_path / version / "engines.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "engines.yaml").symlink_to("..data/engines.yaml")
    look = FileLook(tmp_path / "engines.yaml")
    assert await look.look() == engines("a:1")
    (tmp_path / "..next").symlink_to("..v2")
    (tmp_path / "..next").rename(tmp_path / "..data")
    assert await look.look() == engines("b:1")


async def test_a_name_keeps_its_last_answer(caplog: pytest.LogCaptureFixture) -> None:
    names = Names({"vllm": frozenset({"10.0.0.1", "fd00::1"})})
    look = NameLook(dns("dns:vllm:8000"), names.resolve)
    assert await look.look() == engines("10.0.0.1:8000", "[fd00::1]:8000")
    for nothing in (OSError("servfail"), OSError("servfail"), frozenset[str]()):
        names.answers["vllm"] = nothing
        assert await look.look() is None
    assert len(caplog.records) == 1
    names.answers["vllm"] = frozenset({"10.0.0.2"})
    assert await look.look() == engines("10.0.0.2:8000")


async def test_a_name_that_no_resolver_takes_is_a_failed_answer() -> None:
    assert await NameLook(dns("dns:" + "x" * 64 + ".local:1")).look() is None


async def test_a_fixed_list_is_there_at_once_whatever_else_hangs() -> None:
    class Hung(Names):
        async def resolve(self, host: str, port: int) -> frozenset[str]:
            await asyncio.Event().wait()
            raise AssertionError

    async with watching("a:1", "dns:vllm:8000", names=Hung({})) as found:
        assert await anext(found) == engines("a:1")


async def test_sources_are_united_and_the_first_describes_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    names = Names({"vllm": OSError("no")})
    async with watching("10.0.0.1:8000,ranks=2", f"file:{path}", "dns:vllm:8000", names=names) as found:
        assert await anext(found) == engines("10.0.0.1:8000,ranks=2")
        (tmp_path / "next").write_text("['10.0.0.1:8000,ranks=4', b:1]")
        (tmp_path / "next").rename(path)
        assert await anext(found) == engines("10.0.0.1:8000,ranks=2", "b:1")
        names.answers["vllm"] = frozenset({"10.0.0.1", "10.0.0.2"})
        assert await anext(found) == engines("10.0.0.1:8000,ranks=2", "b:1", "10.0.0.2:8000")


async def test_nothing_is_said_until_something_changes() -> None:
    names = Names({"vllm": frozenset({"10.0.0.1"})})
    async with watching("dns:vllm:8000", names=names) as found:
        assert await anext(found) == engines("10.0.0.1:8000")
        change = asyncio.ensure_future(anext(found))
        for _ in range(3):
            names.asked.clear()
            await names.asked.wait()
        assert not change.done()
        names.answers["vllm"] = frozenset({"10.0.0.2"})
        assert await change == engines("10.0.0.2:8000")


async def test_no_sources_are_no_engines() -> None:
    async with watching() as found:
        assert await anext(found) == frozenset()


async def test_a_defect_of_a_follower_is_not_lost() -> None:
    async with watching("dns:vllm:8000", names=Names({})) as found:
        with pytest.raises(KeyError, match="vllm"):
            await anext(found)
