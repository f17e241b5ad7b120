"""What recording reads, sends, waits for and writes, each by itself."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_cli import capture, record
from kvatlas_cli.record_answers import Answer, Request, incomparable, read_answer, to_tokenize
from kvatlas_cli.record_events import EventLog, Patience
from kvatlas_cli.record_files import CaptureExists, CaptureWriter
from kvatlas_cli.record_workload import EngineTraits, from_file, generate
from kvatlas_common.prompts.requests import CHAT, COMPLETIONS
from kvatlas_indexer.adapters.zmq_source import Origin

ORIGIN = Origin("tcp://127.0.0.1:5557", None, None, 0)
PATIENCE = Patience(quiet_s=0.01, unsure_s=0.02, due_s=30.0, first_s=30.0)


# -- answers -----------------------------------------------------------------------------------------------------------


def page(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_a_whole_chat_answer() -> None:
    raw = page(
        choices=[{"index": 0, "message": {"role": "assistant", "content": "ja"}, "token_ids": [7, 8]}],
        usage={"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}},
        prompt_token_ids=[1, 2, 3],
    )
    assert read_answer(200, raw, streamed=False) == Answer(200, 0, 3, 2, [1, 2, 3], [7, 8], "ja", says_usage=True)


def test_a_streamed_completion_says_the_same() -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "text": "j", "token_ids": [7], "prompt_token_ids": [1, 2, 3]}]},
        {"choices": [{"index": 1, "text": "no", "token_ids": [9]}]},
        {"choices": [{"index": 0, "text": "a", "token_ids": [8]}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}},
    ]
    raw = b"".join(b"data: " + page(**chunk) + b"\r\n\r\n" for chunk in chunks) + b"data: [DONE]\n\n"
    assert read_answer(200, raw, streamed=True) == Answer(200, None, 3, 2, [1, 2, 3], [7, 8], "ja", says_usage=True)


def test_a_stream_without_usage_says_so() -> None:
    raw = b'data: {"choices": [{"index": 0, "delta": {"content": "ja"}}]}\n\ndata: [DONE]\n\n'
    assert read_answer(200, raw, streamed=True) == Answer(200, text="ja")


@given(st.binary(), st.booleans())
def test_any_bytes_are_an_answer(raw: bytes, streamed: bool) -> None:
    assert read_answer(200, raw, streamed).status == 200
    assert read_answer(500, raw, streamed) == Answer(status=500)


MEDIA = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        (CHAT, {"messages": PARTS}, ""),
        (CHAT, {"messages": MEDIA}, "not text alone"),
        (CHAT, {"messages": PARTS, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "several prompts"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/responses", {"input": "a"}, "/v1/responses does not tell its prompt tokens"),
    ],
)
def test_what_cannot_be_compared(path: str, body: dict[str, Any], why: str) -> None:
    assert incomparable(Request(path, body)) == why


@pytest.mark.parametrize(
    ("path", "body", "question"),
    [
        (CHAT, {"messages": PARTS, "tools": []}, {"messages": PARTS, "tools": []}),
        (CHAT, {"messages": PARTS, "documents": [{"text": "x"}]}, None),  # /tokenize does not render them
        (COMPLETIONS, {"prompt": "a", "model": "m", "n": 1}, {"prompt": "a", "model": "m"}),
        (COMPLETIONS, {"prompt": ["a"], "add_special_tokens": False}, {"prompt": "a", "add_special_tokens": False}),
        (COMPLETIONS, {"prompt": [1, 2]}, [1, 2]),
        (COMPLETIONS, {"prompt": [[1, 2]]}, [1, 2]),
        (COMPLETIONS, {"prompt": [1, 2, 3], "truncate_prompt_tokens": 2}, None),
        (COMPLETIONS, {"prompt": []}, None),
        ("/v1/messages", {"messages": PARTS}, None),
    ],
)
def test_how_a_prompt_is_tokenised(path: str, body: dict[str, Any], question: object) -> None:
    assert to_tokenize(Request(path, body)) == question


# -- what is sent ------------------------------------------------------------------------------------------------------


def workload(count: int, seed: int, engine: EngineTraits, prompt_tokens: int = 100) -> list[Request]:
    """Each answered with its own number as text."""
    source, sent = generate(count, engine, seed), []
    request = next(source)
    while True:
        sent.append(Request(request.path, json.loads(json.dumps(request.body)), request.rank))
        try:
            request = source.send(Answer(text=f"answer-{len(sent)}", prompt_tokens=prompt_tokens))
        except StopIteration:
            return sent


def test_the_workload_follows_from_its_seed_and_is_varied() -> None:
    engine = EngineTraits(["tiny", "ada"], ranks=2)
    sent = workload(120, 3, engine)
    assert len(sent) == 120
    assert sent == workload(120, 3, engine) != workload(120, 4, engine)
    assert {request.path for request in sent} == {CHAT, COMPLETIONS}
    assert {request.body["model"] for request in sent} == {"tiny", "ada"}
    assert {request.rank for request in sent} == {0, 1}
    assert {request.body.get("cache_salt") for request in sent} == {None, "tenant-a", "tenant-b"}
    assert {request.body.get("stream") for request in sent} == {None, True}
    bodies = [json.dumps(request.body) for request in sent]
    assert len(set(bodies)) < len(bodies)  # some are asked again as they were


def test_a_conversation_goes_on_from_the_engines_answers_on_its_rank() -> None:
    sent = workload(120, 5, EngineTraits(["tiny"], ranks=2))
    followed = 0
    for request in sent:
        turns = request.body.get("messages", [])
        for before in (turns[:n] for n in range(2, len(turns), 2)):
            earlier = next(n for n, r in enumerate(sent, 1) if r.body.get("messages") == before)
            assert turns[len(before)] == {"role": "assistant", "content": f"answer-{earlier}"}
            assert sent[earlier - 1].rank == request.rank
            followed += 1
    assert followed > 20


def test_a_long_conversation_ends() -> None:
    short = EngineTraits(["tiny"], max_model_len=150)
    assert all(len(r.body.get("messages", [])) <= 2 for r in workload(80, 1, short, prompt_tokens=100))


def test_requests_of_a_file(tmp_path: Path) -> None:
    lines = [
        {"body": {"messages": []}},
        {"i": 1, "path": "/v1/responses", "body": {"input": "x"}, "data_parallel_rank": 1},
        {"body": {"prompt": "x"}},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert from_file(path, 2) == [
        Request(CHAT, {"messages": []}),
        Request("/v1/responses", {"input": "x"}, 1),
        Request(COMPLETIONS, {"prompt": "x"}),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"body": 1}', '{"body": {}, "path": "x"}', '{"body": {}, "data_parallel_rank": 1}']
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"body": {}}\n' + line)
    with pytest.raises(ValueError, match=r"requests\.jsonl:2"):
        from_file(path, 1)


# -- events ------------------------------------------------------------------------------------------------------------


def message(seq: int, *events: object, rank: int = 0, topic: bytes = b"kv@a:1@m") -> list[bytes]:
    return [topic, seq.to_bytes(8, "big"), msgspec.msgpack.encode([1.0 + seq, list(events), rank])]


def stored(blocks: int, *, block_size: int = 16, medium: str = "GPU", group: int = 0) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": list(range(blocks)),
        "parent_block_hash": None,
        "token_ids": [0] * blocks * block_size,
        "block_size": block_size,
        "lora_id": None,
        "medium": medium,
        "group_idx": group,
    }


class Written:
    """A log, and the sequence numbers it has written."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.log = EventLog(self._write, lambda: 1.0)

    def _write(self, t: float, frames: Sequence[bytes]) -> None:
        self.seqs.append(int.from_bytes(frames[1], "big"))

    def hear(self, *messages: list[bytes]) -> None:
        for frames in messages:
            self.log.on_message(ORIGIN, frames)


async def test_history_comes_before_what_was_heard_first() -> None:
    written = Written()
    written.hear(message(2), message(3))
    assert written.seqs == []
    written.log.begin([message(0), message(1)])
    written.hear(message(4))
    assert written.seqs == [0, 1, 2, 3, 4]
    assert written.log.heard.count == written.log.mark().count == 5


async def test_gaps_and_restarts_are_counted_per_rank() -> None:
    written = Written()
    written.log.begin()
    written.hear(message(5), message(6), message(0, rank=1), message(9), message(2, rank=1), message(0))
    heard = written.log.heard
    assert (heard.lost, heard.restarts) == (2 + 1, 1)
    assert (heard.first, heard.last) == ({0: 5, 1: 0}, {0: 0, 1: 2})


async def test_another_engines_messages_are_not_recorded_and_broken_ones_are() -> None:
    written = Written()
    written.log.begin()
    written.hear(message(0), message(7, topic=b"kv@b:1@m"), [b"kv@a:1@m", (1).to_bytes(8, "big"), b"\xc1"], [])
    assert written.seqs == [0, 1]
    assert (written.log.heard.foreign, written.log.heard.malformed) == (2, 1)


async def test_settled_once_what_is_due_is_stored() -> None:
    written = Written()
    written.hear(message(0, stored(9)))  # before the mark
    mark = written.log.mark()
    waiting = asyncio.ensure_future(written.log.until_settled(mark, 64, PATIENCE))
    for seq, event in enumerate([stored(2), stored(9, medium="CPU"), stored(3, group=1), stored(1)], 1):
        written.hear(message(seq, event))
        await asyncio.sleep(PATIENCE.unsure_s)
        assert not waiting.done()  # three blocks of one group, four in all, nine of another medium
    written.hear(message(5, stored(1)))
    assert await waiting


async def test_what_is_due_and_never_comes_is_not_waited_for_forever() -> None:
    written = Written()
    short = Patience(quiet_s=0.01, unsure_s=0.01, due_s=0.05)
    assert not await written.log.until_settled(written.log.mark(), 16, short)
    assert await written.log.until_settled(written.log.mark(), 0, short)


async def test_a_stream_that_never_falls_silent_is_not_settled() -> None:
    written = Written()
    mark = written.log.mark()
    waiting = asyncio.ensure_future(written.log.until_settled(mark, 0, Patience(unsure_s=1.0, due_s=1.2)))
    for seq in range(1000):
        if waiting.done():
            break
        written.hear(message(seq))
        await asyncio.sleep(0.01)
    assert not await waiting


# -- files and arguments -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_an_audit_reads(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "new" / "capture") as files:
        files.message(1.5, message(0))
        files.models(page(data=[{"id": "m"}, {"id": "ada", "root": "/a", "parent": "m"}]))
        files.request(
            {"i": 0, "prompt_token_ids": [1, 2], "cached_tokens": 0, "events_before": 1, "body": {"model": "m"}}
        )
    read = capture.load(tmp_path / "new" / "capture")
    assert [(m.t, list(m.frames)) for m in read.messages] == [(1.5, message(0))]
    assert [(r.prompt_token_ids, r.events_before, r.model) for r in read.requests] == [([1, 2], 1, "m")]
    assert [adapter.name for adapter in read.adapters] == ["ada"]


def test_a_capture_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").touch()
    with pytest.raises(CaptureExists, match=r"requests\.jsonl"):
        CaptureWriter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_a_capture_without_a_request_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for folder in (tmp_path / "mine", tmp_path / "new"):
        with CaptureWriter(folder) as files:
            files.message(1.5, message(0))
            files.models(b"{}")
            files.metrics(b"")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]


def plan(*words: str) -> record.Plan:
    parser = argparse.ArgumentParser(exit_on_error=False)
    record.add_arguments(parser)
    return record.plan_of(parser.parse_args(["capture", *words]))


def test_a_plan() -> None:
    made = plan("--engine", "http://127.0.0.1:8000,ranks=2", "--events", "tcp://127.0.0.1:5557", "--generate", "5")
    assert [made.engine.events_endpoint(engine.rank) for engine in made.engine.ids] == [
        "tcp://127.0.0.1:5557",
        "tcp://127.0.0.1:5558",
    ]
    assert plan("--engine", "a:1", "--zmq-listen", "tcp://*:5557", "--listen", ":80").listen == ("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "a:1", "--events", "nonsense", "--generate", "5"], "events"),
        (["--engine", "a:1", "--events", "tcp://a:2", "--generate", "0"], "--generate"),
        (["--engine", "a:1", "--events", "tcp://a:2", "--listen", "8080"], "--listen"),
        (["--engine", "a:1,api-key-env=NOT_THERE", "--events", "tcp://a:2", "--generate", "1"], "NOT_THERE"),
    ],
)
def test_arguments_of_no_use_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(*words)


def test_requests_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plan("--engine", "a:1", "--events", "tcp://a:2", "--requests", str(tmp_path / "nothing.jsonl"))
