"""Token ids equal those of vLLM itself: its renderer's (320 bodies of every shape, three models) and captured ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kvatlas_common.prompts import PromptPipeline, Unrenderable, understand

DATA = Path(__file__).parents[3] / "data" / "prompts"


def lines(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def ids(pipeline: PromptPipeline, path: str, body: dict[str, Any]) -> list[int]:
    request = understand(path, body)
    assert not isinstance(request, Unrenderable), request.reason
    prompt = pipeline.tokenize(request)
    assert prompt.complete
    assert prompt.n_tokens == len(prompt.token_ids)
    listed: list[int] = prompt.token_ids.tolist()
    return listed


@pytest.mark.parametrize("model", ["tiny", "qwen_like", "llama_like"])
def test_equals_vllms_renderer(model_folder: Any, model: str) -> None:
    cases = [case for case in lines("reference.jsonl.gz") if case["model"] == model]
    assert len(cases) >= 60
    rendered_at = datetime.fromisoformat(cases[0]["rendered_at"])
    fresh = PromptPipeline.load(model_folder(model), now=lambda: rendered_at)
    cramped = PromptPipeline.load(model_folder(model), now=lambda: rendered_at, cache_bytes_max=20_000)
    for pipeline in (fresh, fresh, cramped):  # the second time all of it is remembered, the third time little
        for case in cases:
            before = json.dumps(case["body"])
            assert ids(pipeline, case["path"], case["body"]) == case["token_ids"], case["body"]
            assert json.dumps(case["body"]) == before, "the body must not be changed"


def test_equals_what_engines_reported(pipeline: Any) -> None:
    cases = list(lines("captured.jsonl.gz"))
    assert len(cases) == 10
    for case in cases:
        assert ids(pipeline("tiny"), case["path"], case["body"]) == case["prompt_token_ids"]
