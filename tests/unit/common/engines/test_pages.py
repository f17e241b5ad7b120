"""What an engine says about itself, against pages of real engines and against prometheus_client's own parser."""

from __future__ import annotations

import gzip
import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvatlas_common.engines.pages import (
    CacheConfig,
    EngineMetrics,
    MalformedPage,
    ServedModels,
    parse_metrics,
    parse_models,
    parse_tokenized,
    parse_version,
)
from kvatlas_common.fleet import Adapter

METRICS = Path(__file__).parents[3] / "data" / "metrics"
REAL = gzip.decompress((METRICS / "vllm-0.32-b32.txt.gz").read_bytes())


def test_a_real_page_of_vllm_032() -> None:
    assert parse_metrics(REAL) == EngineMetrics(
        running=0,
        waiting=0,
        kv_usage=0.0,
        process_start_s=1795295284.66,
        cache=CacheConfig(
            block_size=32,
            num_gpu_blocks=32768,
            prefix_caching_hash_algo="sha256",
            enable_prefix_caching=True,
            hash_block_size=None,
        ),
        computed_tokens=13112,
        finished=60,
        ranks=1,
    )
    assert parse_metrics(REAL, rank=0) == parse_metrics(REAL)


def test_a_rank_that_the_page_does_not_have_is_unknown_not_idle() -> None:
    assert parse_metrics(REAL, rank=1) == EngineMetrics(process_start_s=1795295284.66, ranks=1)


def test_ranks_are_told_apart_and_added() -> None:
    page = b"\n".join(
        [
            b'vllm:num_requests_running{engine="0",model_name="m"} 3.0',
            b'vllm:num_requests_running{engine="1",model_name="m"} 4.0 1712345678000',
            b'vllm:num_requests_waiting{engine="0",model_name="m"} 0.0',
            b'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25',
            b'vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5',
        ]
    )
    assert parse_metrics(page, 0) == EngineMetrics(3, 0, 0.25, ranks=2)
    assert parse_metrics(page, 1) == EngineMetrics(4, None, 0.5, ranks=2)
    assert parse_metrics(page) == EngineMetrics(7, 0, 0.5, ranks=2)


def test_older_names_and_sglang() -> None:
    old = b"vllm:num_requests_running 1\nvllm:num_requests_waiting 2\nvllm:gpu_cache_usage_perc 0.5\n"
    assert parse_metrics(old) == EngineMetrics(1, 2, 0.5, ranks=1)
    sglang = (
        b'sglang:num_running_reqs{model_name="m",tp_rank="0"} 5.0\nsglang:num_queue_reqs{model_name="m"} 6.0\n'
        b'sglang:token_usage{model_name="m"} 0.125\nsglang:cache_config_info{page_size="64",num_pages="100"} 1.0\n'
    )
    assert parse_metrics(sglang) == EngineMetrics(
        5, 6, 0.125, None, CacheConfig(block_size=64, num_gpu_blocks=100), ranks=1
    )


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "1e300", "", "x"])
def test_an_absurd_figure_is_unknown(value: str) -> None:
    assert parse_metrics(f"vllm:num_requests_running {value}\n".encode()).running is None


def test_a_name_inside_a_label_or_a_longer_name_is_not_the_metric() -> None:
    page = (
        b'x{a="vllm:num_requests_running 9"} 1\n# HELP vllm:num_requests_running n\n'
        b'vllm:num_requests_running_total{engine="0"} 7\nvllm:num_requests_running{a="}",engine="0"} 2\n'
    )
    assert parse_metrics(page, 0).running == 2


LABEL_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.lists(st.tuples(LABEL_TEXT, st.integers(0, 10**6), st.floats(0, 1)), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["block_size", "_block_size_resolved", "user_block_size", "x"]), LABEL_TEXT),
)
def test_equal_to_the_real_parser(samples: list[tuple[str, int, float]], config: dict[str, str]) -> None:
    registry = CollectorRegistry()
    running = Gauge("vllm:num_requests_running", "n", ["model_name", "engine"], registry=registry)
    usage = Gauge("vllm:kv_cache_usage_perc", "n", ["model_name", "engine"], registry=registry)
    for rank, (name, count, share) in enumerate(samples):
        running.labels(name, str(rank)).set(count)
        usage.labels(name, str(rank)).set(share)
    config = {**config, "prefix_caching_hash_algo": "sha256"}
    Gauge("vllm:cache_config_info", "n", list(config), registry=registry).labels(*config.values()).set(1)
    page = generate_latest(registry)

    read = {f.name: f.samples for f in text_string_to_metric_families(page.decode())}
    for rank in range(len(samples)):
        mine = parse_metrics(page, rank)
        (true,) = [s.value for s in read["vllm:num_requests_running"] if s.labels["engine"] == str(rank)]
        assert mine.running == true
        (true,) = [s.value for s in read["vllm:kv_cache_usage_perc"] if s.labels["engine"] == str(rank)]
        assert mine.kv_usage == true
    cache = parse_metrics(page).cache
    assert cache is not None
    said = read["vllm:cache_config_info"][0].labels.get("block_size", "")
    ascii_number = said.isascii() and said.isdecimal() and 0 < int(said) < 2**31
    assert cache.block_size == (int(said) if ascii_number and len(said) <= 10 else None)


@given(st.binary() | st.text().map(str.encode), st.integers(0, 2**32), st.none() | st.integers(0, 3))
def test_no_page_raises(noise: bytes, seed: int, rank: int | None) -> None:
    parse_metrics(noise, rank)
    rng = random.Random(seed)
    page = bytearray(REAL[: rng.randrange(len(REAL))])
    for _ in range(20):
        at = rng.randrange(len(page) + 1)
        page[at : at + rng.randrange(4)] = noise[:8]
    parse_metrics(bytes(page), rank)


def test_models_of_vllm_with_adapters() -> None:
    page = {
        "object": "list",
        "data": [
            {"id": "qwen", "root": "/models/qwen", "parent": None, "max_model_len": 4096, "permission": [{}]},
            {"id": "qwen-alias", "root": "/models/qwen", "parent": None, "max_model_len": 4096},
            {"id": "sql", "root": "/loras/sql", "parent": "qwen", "max_model_len": None},
            {"id": "poet", "root": "/loras/poet", "parent": "qwen"},
        ],
    }
    assert parse_models(json.dumps(page).encode()) == ServedModels(
        names=frozenset({"qwen", "qwen-alias", "sql", "poet"}),
        adapters=(Adapter("sql", "/loras/sql", 1), Adapter("poet", "/loras/poet", 2)),
        root="/models/qwen",
        max_model_len=4096,
    )
    assert parse_models(b'{"data": [{"id": "m"}]}') == ServedModels(frozenset({"m"}))


def test_token_ids() -> None:
    assert parse_tokenized(b'{"count": 2, "max_model_len": 9, "tokens": [1, 300000], "token_strs": null}') == (
        1,
        300000,
    )


@pytest.mark.parametrize("read", [parse_models, parse_tokenized])
@pytest.mark.parametrize(
    "page", [b"", b"null", b"{}", b"[]", b"\xff", b'{"data": [1]}', b'{"tokens": ["1"]}', b'{"x":' + b"[" * 100_000]
)
def test_a_page_that_is_something_else_is_named(read: object, page: bytes) -> None:
    assert callable(read)
    with pytest.raises(MalformedPage):
        read(page)


@given(st.binary() | st.text().map(str.encode))
@example(b'{"data": [{"id": "\\ud800"}]}')
def test_noise_is_malformed_or_models(page: bytes) -> None:
    with suppress(MalformedPage):
        parse_models(page)


@pytest.mark.parametrize(
    ("page", "version"),
    [
        (b'{"version": "0.32.0"}', "0.32.0"),
        (b'{"version": ""}', None),
        (b'{"version": 3}', None),
        (b'{"other": "x"}', None),
        (b"[]", None),
        (b"not found", None),
    ],
)
def test_versions(page: bytes, version: str | None) -> None:
    assert parse_version(page) == version
