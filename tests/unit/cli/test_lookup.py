"""Questions as they are written, answers as they are shown, and servers that are not there or not what they should be.

One small deployment (a simulated engine, an indexer, a router) answers for all tests of this module.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from kvatlas_cli import local, lookup
from kvatlas_cli.__main__ import _parser, main
from kvatlas_cli.lookup import question_of
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig
from kvatlas_loadtest.texts import WORDS
from kvatlas_loadtest.time_model import NO_TIME
from kvatlas_router.settings import RouterSettings

PROMPT = " ".join(WORDS * 2)
DEADLINE_S = 20.0


def asked(*words: str, stdin: str = "") -> object:
    """The body that these words of a command line ask about."""
    return json.loads(question_of(_parser("lookup", lookup).parse_args(["lookup", *words]), io.StringIO(stdin)))


def test_a_text_is_the_prompt_of_a_completion() -> None:
    assert asked("once upon a time") == {"prompt": "once upon a time"}
    assert asked("", "--model", "tiny") == {"prompt": "", "model": "tiny"}


def test_messages_may_be_a_body_or_a_bare_list(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (tmp_path / "body.json").write_text(json.dumps({"messages": messages, "cache_salt": "a"}))
    assert asked("--messages", str(tmp_path / "body.json")) == {"messages": messages, "cache_salt": "a"}
    assert asked("--messages", "-", "--model", "m", stdin=json.dumps(messages)) == {"messages": messages, "model": "m"}


def test_the_model_named_replaces_that_of_the_body() -> None:
    assert asked("--body", "-", "--model", "ada", stdin='{"model": "tiny", "input": "x"}') == {
        "model": "ada",
        "input": "x",
    }


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (["--body", "-"], "{", "- is not JSON"),
        (["--body", "-"], "[1]", "not a request body"),
        (["--messages", "-"], '{"prompt": "x"}', 'no "messages"'),
        (["--body", "/nowhere/body.json"], "", "/nowhere/body.json cannot be read"),
    ],
)
def test_a_question_that_cannot_be_used(words: list[str], stdin: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked(*words, stdin=stdin)


@pytest.mark.parametrize("words", [[], ["text", "--engines"], ["--key", "1", "--body", "-"]])
def test_one_question_at_a_time(words: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["lookup", *words])
    assert refused.value.code == 2


@dataclass(frozen=True, slots=True)
class Deployment:
    """`key`: of a block that `engine` holds."""

    admin: str
    indexer: str
    public: str
    engine: str
    idle_engine: str

    @property
    def addresses(self) -> list[str]:
        return ["--admin", self.admin, "--indexer", self.indexer]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Runs in a thread of its own, for `kvatlas lookup` is not asynchronous."""
    ready, done = threading.Event(), threading.Event()
    found: list[Deployment] = []
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            asyncio.run(_serve(found, ready, done))
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        assert not failed, failed
        yield found[0]
    finally:
        done.set()
        thread.join(DEADLINE_S)
    assert not failed, failed


async def _serve(found: list[Deployment], ready: threading.Event, done: threading.Event) -> None:
    anywhere = {"grpc_listen": "127.0.0.1:0", "rest_listen": "127.0.0.1:0", "zmq_listen": ()}
    indexing = IndexerSettings.model_validate(anywhere)
    routing = RouterSettings.model_validate({"host": "127.0.0.1", "port": 0, "admin_port": 0})
    async with (
        local.simulated([EngineConfig(time_model=NO_TIME), EngineConfig(time_model=NO_TIME)]) as engines,
        local.serving(indexing, routing, engines, os.environ) as stack,
        aiohttp.ClientSession() as client,
    ):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        async with client.post(f"{engines[0].url}/v1/completions", json=body) as answer:
            assert answer.status == 200

        async def routed_precisely() -> bool:
            async with client.post(f"{stack.admin_url}/debug/route", json=body) as answer:
                decision = await answer.json()
                return answer.status == 200 and decision["engines"][0]["cached_tokens"] is not None

        await local.until(routed_precisely, "a precise route", DEADLINE_S)
        indexer = f"http://{stack.indexer.rest_address}"
        found.append(Deployment(stack.admin_url, indexer, stack.url, engines[0].address, engines[1].address))
        ready.set()
        await asyncio.to_thread(done.wait)


def test_a_prompt_is_explained_engine_by_engine(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup", *deployment.addresses, "--model", "tiny", PROMPT]) == 0
    shown = capsys.readouterr().out
    assert f"choice: {deployment.engine}, precise" in shown
    (chosen,) = (line.split() for line in shown.splitlines() if line.strip().startswith("->"))
    arrow, engine, blocks, cached, medium, in_medium, exact, *_ = chosen
    assert (arrow, engine, medium, exact) == ("->", deployment.engine, "gpu", "yes")
    assert int(blocks) == int(in_medium) > 0
    assert int(cached) == int(blocks) * 16
    (other,) = (line.split() for line in shown.splitlines() if line.strip().startswith(deployment.idle_engine))
    assert other[1] == "0"  # it has published nothing, and that is known: it holds nothing


def test_who_holds_a_block(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup", *deployment.addresses, "--json", PROMPT]) == 0
    (keys,) = json.loads(capsys.readouterr().out)["keys"].values()
    for key in (str(keys[0]), hex(keys[0])):
        assert main(["lookup", *deployment.addresses, "--model", "tiny", "--key", key]) == 0
        assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
            [deployment.engine, "0", "gpu", "1"]
        ]
    assert main(["lookup", *deployment.addresses, "--key", "1"]) == 0
    assert "no engine that serves tiny holds block 1" in capsys.readouterr().out


def test_the_fleet(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lookup", *deployment.addresses, "--engines"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    (line,) = (line for line in lines if deployment.engine in line)
    assert "ready" in line
    assert "tiny" in line
    assert "sha256/b16" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nope", "x"], ["no engine serves 'nope'; served: tiny", "--model"]),
        (["--key", "banana"], ["'banana' is not a block key"]),
        (["--model", "nope", "--key", "1"], ["404", "--model"]),
    ],
)
def test_what_the_server_refuses_is_passed_on_with_the_cure(
    deployment: Deployment, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    assert main(["lookup", *deployment.addresses, *words]) == 1
    complaint = capsys.readouterr().err
    assert all(part in complaint for part in said)


def test_a_wrong_port_is_named(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, url, words in (
        ("--admin", deployment.public, ["x"]),
        ("--admin", deployment.indexer, ["x"]),
        ("--admin", f"http://{deployment.engine}", ["x"]),
        ("--indexer", deployment.public, ["--engines"]),
    ):
        assert main(["lookup", flag, url, *words]) == 1
        complaint = capsys.readouterr().err
        assert "a wrong port?" in complaint
        assert flag in complaint


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused for as long as we hold it
        assert main(["lookup", "--admin", f"http://127.0.0.1:{taken.getsockname()[1]}", "x"]) == 1
    complaint = capsys.readouterr().err
    assert "nobody listens" in complaint
    assert "kvatlas up" in complaint


def test_a_server_that_says_nothing_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["lookup", "--indexer", url, "--engines", "--timeout-s", "0.1"]) == 1
    assert "did not answer within 0.1 s" in capsys.readouterr().err
