"""Questions as written, answers as shown, and servers that are not there or not what they should be."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvatlas_cli import lookup
from kvatlas_cli.__main__ import _parser, main
from kvatlas_cli.lookup import question_of
from tests.unit.cli.deployment_kit import PROMPT, Deployment, deployed


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed() as made:
        yield made


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
