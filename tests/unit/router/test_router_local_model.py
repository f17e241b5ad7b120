"""Tokens made by a fast encoder that turns out to be wrong: it is found out, stopped, counted, and nothing is kept."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from kvatlas_common.prompts import PromptPipeline, understand
from kvatlas_common.prompts.encoders import CheckedEncoder, Encoder
from kvatlas_common.prompts.requests import TokenIds
from kvatlas_router.adapters.local_model import FAST_INLINE_BYTES, INLINE_BYTES, LocalModel
from kvatlas_router.adapters.metrics import Metrics

TINY = Path(__file__).parents[2] / "data" / "models" / "tiny"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Name a colour."}]}


class OneOff:
    """Right, but for the last token."""

    def __init__(self, exact: Encoder) -> None:
        self._exact = exact

    def encode(self, text: str) -> TokenIds:
        ids = self._exact.encode(text).copy()
        ids[-1:] += 1
        return ids


async def loaded() -> tuple[LocalModel, PromptPipeline, Metrics]:
    metrics = Metrics()
    model = LocalModel((str(TINY),), {}, metrics)
    pipeline = await model.loaded()
    assert pipeline is not None
    return model, pipeline, metrics


def tokens(pipeline: PromptPipeline) -> list[int]:
    request = understand("/v1/chat/completions", BODY)
    found: list[int] = pipeline.tokenize(request).token_ids.tolist()  # type: ignore[arg-type]
    return found


async def test_a_wrong_encoder_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model, pipeline, metrics = await loaded()
    tokenizer = pipeline.tokenizer
    assert isinstance(tokenizer.encoder, CheckedEncoder)
    right = tokens(pipeline)
    exact = tokenizer.encoder._exact
    tokenizer.encoder = CheckedEncoder(OneOff(exact), exact)
    pipeline.forget()
    assert await model.run(lambda: tokens(pipeline), 0) != right
    async with asyncio.timeout(30):
        while await model.run(lambda: tokens(pipeline), 0) != right:
            await asyncio.sleep(0)
    assert metrics.registry.get_sample_value("kvatlas_router_encoder_differences_total") == 1
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "colour" not in str(vars(line))
    assert await model.run(lambda: tokens(pipeline), 0) == right
    model.close()


async def test_what_takes_long_runs_in_the_models_own_thread() -> None:
    model, pipeline, _ = await loaded()
    here = threading.get_ident()

    async def inline(size: int) -> bool:
        return await model.run(threading.get_ident, size) == here

    assert [await inline(size) for size in (INLINE_BYTES, FAST_INLINE_BYTES)] == [True, True]
    assert not await inline(FAST_INLINE_BYTES + 1)
    assert isinstance(pipeline.tokenizer.encoder, CheckedEncoder)
    pipeline.tokenizer.encoder = pipeline.tokenizer.encoder._exact
    assert [await inline(size) for size in (INLINE_BYTES, INLINE_BYTES + 1)] == [True, False]
    assert np.array_equal(await model.run(lambda: tokens(pipeline), 0), tokens(pipeline))
    model.close()
