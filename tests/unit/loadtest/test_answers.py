"""Answers are the same every time, and read back as the very tokens that were generated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kvatlas_common.prompts.errors import BadModelFiles
from kvatlas_loadtest.answers import AnswerWords
from kvatlas_loadtest.engine import TINY_MODEL
from kvatlas_loadtest.time_model import NO_TIME, StepWork, TimeModel
from kvatlas_loadtest.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TINY_MODEL)


def answer(vocabulary: Vocabulary, prompt: list[int], seed: int = 0, continues: bool = False) -> list[int]:
    sample = vocabulary.words.sampler(prompt, seed, continues)
    return [sample(i) for i in range(200)]


@pytest.mark.parametrize("continues", [False, True])
def test_an_answer_is_tokenised_to_what_was_generated(vocabulary: Vocabulary, continues: bool) -> None:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    tokens = answer(vocabulary, [1, 2, 3], continues=continues)
    text = "".join(vocabulary.text_of[token] for token in tokens)
    assert tokenizer.encode(text, add_special_tokens=False).ids == tokens
    turn = tokenizer.encode(f"<|im_start|>assistant\n{text}<|im_end|>", add_special_tokens=False).ids
    assert turn[3:-1] == tokens or turn[-1 - len(tokens) : -1] == tokens
    assert text.startswith(" ") == continues


def test_seed_and_prompt_decide_and_nothing_else(vocabulary: Vocabulary) -> None:
    first = answer(vocabulary, [1, 2, 3])
    assert first == answer(vocabulary, [1, 2, 3])
    assert first != answer(vocabulary, [1, 2, 4])
    assert first != answer(vocabulary, [1, 2, 3], seed=1)
    assert len(set(first)) > 100  # words, not one word


def test_the_vocabulary_knows_its_end(vocabulary: Vocabulary) -> None:
    assert vocabulary.eos == json.loads((TINY_MODEL / "config.json").read_text())["eos_token_id"]
    assert vocabulary.eos not in vocabulary.text_of


def test_a_vocabulary_without_words_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFiles, match=r"tokenizer\.json"):
        Vocabulary.load(tmp_path)
    with pytest.raises(ValueError, match="no whole words"):
        AnswerWords((), (1,))


def test_the_time_of_a_step() -> None:
    model = TimeModel(step_s=1.0, prefill_token_s=0.1, decode_sequence_s=0.01, context_token_s=0.001, speed=2.0)
    assert model.seconds(StepWork(10, 3, 100)) == pytest.approx((1 + 1 + 0.03 + 0.1) / 2)
    assert NO_TIME.seconds(StepWork(10, 3, 100)) == 0.0
    with pytest.raises(ValueError, match="speed"):
        TimeModel(speed=0.0)


def test_the_default_is_the_published_engine() -> None:
    """A prompt of 10,000 tokens, cold, in chunks of 2,048: 4.3 s to its first token."""
    chunks = [2048] * 4 + [10_000 - 4 * 2048]
    assert sum(TimeModel().seconds(StepWork(chunk, 0, 0)) for chunk in chunks) == pytest.approx(4.3, rel=0.05)
