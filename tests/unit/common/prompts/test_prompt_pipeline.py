"""The whole way from body to keys, and what is known of a prompt that is not all text."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.prompts import (
    BadTemplate,
    EngineRendering,
    ModelFilesMissing,
    PromptError,
    PromptPipeline,
    TokenizedPrompt,
    Unrenderable,
    from_token_ids,
    understand,
)

TINY = Path(__file__).parents[3] / "data" / "models" / "tiny"
PROFILE = HashProfile(Algorithm.SHA256_CBOR, "42", 4, ExtraKeys.TAGGED)
SALTED = PromptExtras(cache_salt="s")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/i.png"}}


def tokenize(pipeline: PromptPipeline, path: str, **body: Any) -> TokenizedPrompt:
    request = understand(path, body)
    assert not isinstance(request, Unrenderable), request.reason
    return pipeline.tokenize(request)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]


def text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


TURN = st.tuples(
    st.sampled_from(["system", "user", "assistant"]),
    st.sampled_from(["", "hello there", "a<|im_end|>b", "<|im_start|>", "one two three four five six"])
    | st.text(max_size=9),
)


@given(conversations=st.lists(st.lists(TURN, min_size=1, max_size=5), min_size=1, max_size=6), salted=st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("model", ["tiny", "llama_like"])
def test_remembered_prompts_equal_fresh_ones(pipeline: Any, model: str, conversations: Any, salted: bool) -> None:
    extras = SALTED if salted else PromptExtras()
    plain = pipeline(model).tokenizer.encoder
    for conversation in conversations:
        messages = [{"role": role, "content": content} for role, content in conversation]
        request = understand(CHAT, {"messages": messages})
        prompt = pipeline(model).tokenize(request)
        rendered, _ = pipeline(model)._render(request)
        assert prompt.token_ids.tolist() == plain.encode(rendered).tolist()
        keys = pipeline(model).keys(prompt, PROFILE, extras)
        assert keys.dtype == np.uint64
        assert keys.tolist() == prompt_keys(PROFILE, prompt.token_ids, extras).tolist()
        again = pipeline(model).tokenize(request)
        assert again.reused_tokens == again.n_tokens == prompt.n_tokens
        assert pipeline(model).keys(again, PROFILE, extras).tolist() == keys.tolist()


def test_a_system_prompt_is_reused_by_the_next_question(pipeline: Any) -> None:
    system = {"role": "system", "content": "You are an oracle for questions of reuse."}
    first = tokenize(pipeline("tiny"), CHAT, messages=[system, *user("What is new?")])
    second = tokenize(pipeline("tiny"), CHAT, messages=[system, *user("What is old?")])
    assert first.reused_tokens < second.reused_tokens < second.n_tokens
    shared = second.reused_tokens // PROFILE.block_size
    keys = [pipeline("tiny").keys(p, PROFILE, PromptExtras()).tolist() for p in (first, second)]
    assert keys[0][:shared] == keys[1][:shared]
    assert keys[0] != keys[1]


def test_the_last_token_is_never_served_from_a_cache(pipeline: Any) -> None:
    for n, blocks in ((0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)):
        prompt = from_token_ids(list(range(n)))
        assert prompt.cacheable_blocks(4) == blocks
        assert len(pipeline("tiny").keys(prompt, PROFILE, PromptExtras())) == blocks


def test_token_ids_have_the_keys_of_the_text(pipeline: Any) -> None:
    ids = list(range(5000))
    prompt = tokenize(pipeline("tiny"), COMPLETIONS, prompt=ids)
    assert prompt.token_ids.tolist() == ids
    for _ in range(2):
        keys = pipeline("tiny").keys(prompt, PROFILE, SALTED)
        assert keys.tolist() == prompt_keys(PROFILE, ids, SALTED).tolist()
    with pytest.raises(PromptError):
        from_token_ids([1, -1])


def test_beginning_of_text_is_added_to_completions_only(pipeline: Any) -> None:
    llama = pipeline("llama_like")
    assert tokenize(llama, COMPLETIONS, prompt="a").token_ids[0] == 8000
    assert tokenize(llama, COMPLETIONS, prompt="a", add_special_tokens=False).token_ids[0] != 8000
    ids = tokenize(llama, CHAT, messages=user("a")).token_ids.tolist()
    assert ids.count(8000) == 1  # the template's own


def test_truncation_keeps_special_tokens_unless_a_side_is_given(pipeline: Any) -> None:
    llama = pipeline("llama_like")
    whole = tokenize(llama, COMPLETIONS, prompt="a b c d e").token_ids.tolist()
    assert len(whole) == 6
    for side, kept in ((None, [8000, *whole[-2:]]), ("left", whole[-3:]), ("right", whole[:3])):
        cut = tokenize(llama, COMPLETIONS, prompt="a b c d e", truncate_prompt_tokens=3, truncation_side=side)
        assert cut.token_ids.tolist() == kept
        assert cut.n_tokens == 3
    ids = tokenize(llama, COMPLETIONS, prompt=[1, 2, 3], truncate_prompt_tokens=2)
    assert ids.token_ids.tolist() == [2, 3]


@pytest.mark.parametrize("model", ["tiny", "qwen_like", "llama_like"])
def test_a_prompt_is_known_up_to_its_first_image(pipeline: Any, model: str) -> None:
    """True whatever the engine puts in the image's place: here, a placeholder, one of several, and none."""
    before = [{"role": "system", "content": "Look."}, *user("First, a text.")]
    known = tokenize(pipeline(model), CHAT, messages=[*before, *user(text("see "), IMAGE, text("this"))])
    assert not known.complete
    shared = tokenize(pipeline(model), CHAT, messages=before, add_generation_prompt=False)
    assert known.n_tokens > shared.n_tokens, "all messages before"
    ids = known.token_ids.tolist()
    stand_ins = ["see <|image|>this", "<|image|><|image|>\nsee \nthis", "<|vision_start|>see this"]
    for content in stand_ins[:1] if model == "llama_like" else stand_ins[1:]:
        whole = tokenize(pipeline(model), CHAT, messages=[*before, *user(content)])
        assert whole.token_ids.tolist()[: len(ids)] == ids
    keys = pipeline(model).keys(known, PROFILE, SALTED)
    assert len(keys) == known.n_tokens // PROFILE.block_size
    assert keys.tolist() == prompt_keys(PROFILE, [*ids, 0], SALTED).tolist()


def test_text_before_an_image_in_the_same_message_counts_where_the_template_takes_parts(pipeline: Any) -> None:
    llama = pipeline("llama_like")
    known = tokenize(llama, CHAT, messages=user(text("see the "), IMAGE, text("this")))
    whole = tokenize(llama, CHAT, messages=user("see the <|image|>this")).token_ids.tolist()
    assert whole[known.n_tokens] == 8004
    assert known.token_ids.tolist() == whole[: known.n_tokens]


def test_an_image_a_template_puts_first_is_not_taken_for_text(model_folder: Any, tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama_like"), tmp_path / "m")
    source = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<|image|>{% endif %}{% endfor %}"
    source += "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(source)
    known = tokenize(PromptPipeline.load(tmp_path / "m"), CHAT, messages=user(text("<|eot_id|>see"), IMAGE))
    assert (known.n_tokens, known.complete) == (0, False)


def test_what_engines_were_started_with(model_folder: Any) -> None:
    qwen = model_folder("qwen_like")
    plain, off = PromptPipeline.load(qwen), EngineRendering(template_kwargs={"enable_thinking": False})
    quiet = PromptPipeline.load(qwen, engines=off)
    asked = tokenize(plain, CHAT, messages=user("a"), chat_template_kwargs={"enable_thinking": False})
    assert tokenize(quiet, CHAT, messages=user("a")).token_ids.tolist() == asked.token_ids.tolist()
    override = tokenize(quiet, CHAT, messages=user("a"), chat_template_kwargs={"enable_thinking": True})
    assert override.token_ids.tolist() == tokenize(plain, CHAT, messages=user("a")).token_ids.tolist()
    given = PromptPipeline.load(qwen, engines=EngineRendering(chat_template="{{ messages[0].content }}"))
    assert tokenize(given, CHAT, messages=user("a")).token_ids.tolist() == plain.tokenizer.encoder.encode("a").tolist()


def test_the_date_of_a_volatile_template_is_the_clocks(model_folder: Any) -> None:
    days = [datetime(2026, 11, 22), datetime(2026, 11, 23)]
    pipeline = PromptPipeline.load(model_folder("llama_like"), now=lambda: days[0])
    assert pipeline.templates.volatile
    prompts = [tokenize(pipeline, CHAT, messages=user("a")).token_ids.tolist()]
    days.pop(0)
    prompts.append(tokenize(pipeline, CHAT, messages=user("a")).token_ids.tolist())
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": 5}},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "alien", "content": "a"}]},  # the template refuses it
        {"messages": user(IMAGE), "truncate_prompt_tokens": 5},
    ],
)
def test_what_cannot_be_rendered_is_a_prompt_error(pipeline: Any, body: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        tokenize(pipeline("qwen_like"), CHAT, **body)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesMissing, match="HF_HOME"):
        PromptPipeline.load(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadTemplate, match="default"):
        PromptPipeline.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    bare = PromptPipeline.load(tmp_path)  # no template: completions only
    assert tokenize(bare, COMPLETIONS, prompt="a").n_tokens == 1
    with pytest.raises(PromptError, match="no chat template"):
        tokenize(bare, CHAT, messages=user("a"))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["user", "text", "image_url"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls", "function"]), inner)
    ),
    max_leaves=12,
)


@given(
    messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": ANY})),
    tools=st.none() | st.lists(ANY, min_size=1, max_size=2),
    calls=ANY,
)
@settings(max_examples=80, deadline=None)
def test_no_body_raises_anything_but_a_prompt_error(pipeline: Any, messages: Any, tools: Any, calls: Any) -> None:
    body = json.loads(json.dumps({"messages": [{**m, "tool_calls": calls} for m in messages], "tools": tools}))
    request = understand(CHAT, body)
    for model in ("qwen_like", "llama_like"):
        if not isinstance(request, Unrenderable):
            try:
                prompt = pipeline(model).tokenize(request)
            except PromptError:
                continue
            assert prompt.n_tokens == len(prompt.token_ids)
