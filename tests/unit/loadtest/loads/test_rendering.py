from __future__ import annotations

import pytest

from kvatlas_loadtest.loads.arrivals import Answer, Arrival, Segment
from kvatlas_loadtest.loads.rendering import Rendering
from kvatlas_loadtest.texts import text


def arrival(*prompt: Segment | Answer, salt: str | None = None) -> Arrival:
    return Arrival(0.0, prompt, output_tokens=5, salt=salt)


def test_a_chat_has_a_message_for_each_row_of_segments_and_for_each_answer() -> None:
    asked = arrival(Segment(1, 3), Segment(2, 2), Answer(0), Segment(3, 1), Answer(4), Segment(5, 1))
    body = Rendering("m").body(asked, {0: "one", 4: "two"})
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "messages": [
            {"role": "user", "content": f"{text(1, 3)} {text(2, 2)}"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": text(3, 1)},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": text(5, 1)},
        ],
    }


def test_a_completion_is_one_text() -> None:
    rendering = Rendering("m", chat=False, extra={"ignore_eos": True})
    body = rendering.body(arrival(Segment(1, 3), Answer(0), Segment(2, 2), salt="s"), {0: "said"})
    assert rendering.path == "/v1/completions"
    assert body["prompt"] == f"{text(1, 3)} said {text(2, 2)}"
    assert (body["cache_salt"], body["ignore_eos"]) == ("s", True)


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_with_the_same_leading_parts_begin_alike(chat: bool) -> None:
    rendering = Rendering("m", chat=chat)
    short, long = (rendering.body(arrival(*p), {}) for p in ([Segment(1, 50)], [Segment(1, 80), Segment(2, 5)]))
    first, second = ((b["messages"][0]["content"] if chat else b["prompt"]) for b in (short, long))
    assert second.startswith(first + " ")


def test_an_answer_that_is_not_known_cannot_be_written_out() -> None:
    with pytest.raises(KeyError):
        Rendering("m").body(arrival(Answer(3)), {})
