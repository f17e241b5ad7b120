"""The acceptance's workload: mixed as it claims, repeatable, and conversations that really go on."""

from __future__ import annotations

import random
from collections import Counter

from tests.live.workload import CHAT, CONVERSATION_CHARS_MAX, Ask, Workload

WORDS = ("cache", "block", "engine", "prefix", "token")


def drawn(seed: int = 1, requests: int = 200) -> list[Ask]:
    workload = Workload(random.Random(seed), WORDS, requests=requests, model="m")
    asks: list[Ask] = []
    while wave := workload.wave():
        asks += wave
        for ask in wave:
            workload.answered(ask, f"answer {ask.number}")
    return asks


def test_all_requests_are_asked_once_in_order() -> None:
    assert [ask.number for ask in drawn()] == list(range(200))


def test_a_run_can_be_had_again() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_every_kind_occurs_streamed_and_not() -> None:
    kinds = Counter((ask.kind, ask.streamed) for ask in drawn())
    expected = ["chat", "parts", "tools", "salted", "keywords", "text", "prompt"]
    expected += ["one of a list", "token ids", "token ids in a list", "salted prompt", "said again"]
    assert {kind for kind, _ in kinds} == set(expected)
    assert all(any(kinds[kind, streamed] for kind in expected) for streamed in (True, False))


def test_streams_ask_for_usage() -> None:
    assert all(("stream_options" in ask.body) == ask.streamed == ask.body.get("stream", False) for ask in drawn())


def test_follow_ups_hold_the_turn_before_and_its_answer() -> None:
    asks = drawn()
    turns: dict[tuple[int | None, int], Ask] = {
        (ask.conversation, ask.turn): ask for ask in asks if ask.conversation is not None
    }
    follow_ups = [ask for ask in turns.values() if ask.turn]
    assert len(follow_ups) > 60
    for ask in follow_ups:
        before = turns[ask.conversation, ask.turn - 1]
        if ask.path == CHAT:
            messages = before.body["messages"]
            assert ask.body["messages"][: len(messages)] == messages
            answer = ask.body["messages"][len(messages)]
            assert answer == {"role": "assistant", "content": f"answer {before.number}"}
        else:
            assert ask.body["prompt"].startswith(before.body["prompt"] + f"answer {before.number}")


def test_a_conversation_is_never_twice_in_a_wave() -> None:
    workload = Workload(random.Random(5), WORDS, requests=300, model="m")
    while wave := workload.wave():
        conversations = [ask.conversation for ask in wave if ask.conversation is not None]
        assert len(conversations) == len(set(conversations))
        assert all(ask.alone == (len(wave) == 1) for ask in wave)
        for ask in wave:
            workload.answered(ask, "x" * 50)


def test_prompts_stay_within_what_engines_take() -> None:
    workload = Workload(random.Random(6), WORDS, requests=300, model="m")
    longest = 0
    while wave := workload.wave():
        for ask in wave:
            workload.answered(ask, "y" * 400)
            longest = max(longest, len(str(ask.body.get("messages", ask.body.get("prompt")))))
    assert longest < 2 * CONVERSATION_CHARS_MAX
