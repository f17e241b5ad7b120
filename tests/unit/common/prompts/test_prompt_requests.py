"""What `understand` makes of bodies: kinds, facts, and reasons for what is not rendered here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.prompts import ChatPrompt, TextPrompt, TokenPrompt, Unrenderable, understand
from kvatlas_common.prompts.requests import Truncation, token_array

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def test_a_chat_with_its_facts() -> None:
    body = {
        "model": "m",
        "messages": HELLO,
        "cache_salt": "s",
        "stream": True,
        "max_tokens": 7,
        "tools": [{"function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "unknown": 1,
    }
    request = understand(CHAT, body)
    assert isinstance(request, ChatPrompt)
    facts = request.facts
    assert (facts.model, facts.cache_salt, facts.stream, facts.n, facts.max_tokens) == ("m", "s", True, 1, 7)
    assert not facts.incomparable
    assert request.add_generation_prompt
    assert not request.add_special_tokens
    assert request.template_kwargs == {"enable_thinking": False}


def test_completions_by_kind_of_prompt() -> None:
    text = understand(COMPLETIONS, {"prompt": "hello", "truncate_prompt_tokens": 3, "truncation_side": "right"})
    assert isinstance(text, TextPrompt)
    assert (text.text, text.add_special_tokens, text.truncation) == ("hello", True, Truncation(3, "right"))
    ids = understand(COMPLETIONS, {"prompt": [5, 6]})
    assert isinstance(ids, TokenPrompt)
    assert ids.token_ids.tolist() == [5, 6]
    nested = understand(COMPLETIONS, {"prompt": [[5, 6]]})
    assert isinstance(nested, TokenPrompt)
    assert not nested.facts.incomparable


def test_of_several_prompts_the_first_counts() -> None:
    several = understand(COMPLETIONS, {"prompt": ["a", "b"]})
    assert isinstance(several, TextPrompt)
    assert (several.text, several.facts.incomparable) == ("a", "several prompts")
    nested = understand(COMPLETIONS, {"prompt": [[1], [2]]})
    assert isinstance(nested, TokenPrompt)
    assert nested.token_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("path", "extra", "comparable"),
    [
        (CHAT, {}, True),
        (CHAT, {"n": 1, "echo": False, "prompt_logprobs": None}, True),
        (CHAT, {"n": 2}, False),
        (CHAT, {"n": "2"}, False),
        (CHAT, {"prompt_logprobs": 0}, False),
        (CHAT, {"use_beam_search": True}, False),
        (CHAT, {"echo": True}, False),  # asks for prompt logprobs
        (COMPLETIONS, {"echo": True}, True),
        (COMPLETIONS, {"echo": True, "logprobs": 1}, False),
        (CHAT, {"kv_transfer_params": {"do_remote_decode": True}}, False),
    ],
)
def test_whether_cached_tokens_will_be_comparable(path: str, extra: dict[str, Any], comparable: bool) -> None:
    request = understand(path, {"messages": HELLO, "prompt": "hello"} | extra)
    assert not isinstance(request, Unrenderable)
    assert (request.facts.incomparable == "") is comparable


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ("/v1/embeddings", {"input": "x"}, "path /v1/embeddings"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": HELLO, "chat_template": "{{ x }}"}, "own chat_template"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "messages"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": []}, "chat_template_kwargs is not an object"),
        (CHAT, {"messages": HELLO, "tools": []}, "tools"),
        (CHAT, {"messages": HELLO, "documents": ["x"]}, "documents"),
        (CHAT, {"messages": HELLO, "continue_final_message": True}, "both"),
        (CHAT, {"messages": HELLO, "add_generation_prompt": "no"}, "add_generation_prompt is not a boolean"),
        (CHAT, {"messages": HELLO, "cache_salt": 5}, "cache_salt"),
        (CHAT, {"messages": HELLO, "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        (CHAT, {"messages": HELLO, "kv_transfer_params": {"prompt_token_ids": [1]}}, "prompt_token_ids"),
        (COMPLETIONS, {}, "neither text nor token ids"),
        (COMPLETIONS, {"prompt": ""}, "neither text nor token ids"),
        (COMPLETIONS, {"prompt": []}, "neither text nor token ids"),
        (COMPLETIONS, {"prompt": [-1]}, "neither text nor token ids"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "neither text nor token ids"),
        (COMPLETIONS, {"prompt": "a", "prompt_embeds": "AA=="}, "prompt_embeds"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/tokenize", {"prompt": ["a"]}, "prompt string"),
    ],
)
def test_what_is_not_rendered_says_why(path: str, body: dict[str, Any], reason: str) -> None:
    request = understand(path, body | {"model": "m"})
    assert isinstance(request, Unrenderable)
    assert reason in request.reason
    assert request.facts.model == "m"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "messages",
        "prompt",
        "tools",
        "n",
        "stream",
        "model",
        "cache_salt",
        "chat_template_kwargs",
        "kv_transfer_params",
        "documents",
        "echo",
        "truncate_prompt_tokens",
        "max_tokens",
        "add_special_tokens",
    ]
)


@given(path=st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/v1/other"]), body=st.dictionaries(FIELDS, JSON))
def test_never_raises(path: str, body: dict[str, Any]) -> None:
    assert understand(path, body).facts.n >= 1


def test_token_arrays() -> None:
    top = (1 << 32) - 1
    assert token_array([0, top]) is not None
    assert token_array(np.array([0, top])) is not None
    for wrong in (
        [0, top + 1],
        [-1],
        [0.5],
        "ab",
        b"ab",
        None,
        [[1]],
        np.array([-1]),
        np.array([0.5]),
        np.array([[1]]),
    ):
        assert token_array(wrong) is None
