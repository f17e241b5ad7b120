"""What an engine says about itself, read from its pages. Pure: bytes in, values out.

A metrics page of vLLM 0.32 has 640 lines, of which six matter; they are found by name and the rest is never parsed. A
figure that is missing or absurd is None, never zero: an engine that does not say how busy it is, is not idle.

Names after vLLM 0.10 - 0.32 (`v1/metrics/loggers.py`, `vllm/config/cache.py`) and SGLang (`metrics_collector.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from kvatlas_common.fleet import Adapter

RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
CACHE_CONFIG = ("vllm:cache_config_info", "sglang:cache_config_info")
PROCESS_START = ("process_start_time_seconds",)
LORAS = "vllm:lora_requests_info"
CACHE_QUERIES = ("vllm:prefix_cache_queries_total",)
CACHE_HITS = ("vllm:prefix_cache_hits_total",)
FINISHED = ("vllm:request_success_total",)
METRIC_NAMES = (
    *RUNNING, *WAITING, *KV_USAGE, *CACHE_CONFIG, *PROCESS_START, *CACHE_QUERIES, *CACHE_HITS, *FINISHED, LORAS
)  # fmt: skip

_RANK_LABELS = ("engine", "dp_rank")  # of vLLM and of SGLang
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')
_LORA_LABELS = ("running_lora_adapters", "waiting_lora_adapters")
_LORAS_MAX = 256
_COUNT_MAX = 2**31 - 1


class MalformedPage(ValueError):
    """The page is not what an engine serves there."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """`vllm:cache_config_info`; None is not said. `hash_block_size` is set where hashes cover less than a block."""

    block_size: int | None = None
    num_gpu_blocks: int | None = None
    prefix_caching_hash_algo: str | None = None
    enable_prefix_caching: bool | None = None
    hash_block_size: int | None = None

    @property
    def gpu_tokens(self) -> int | None:
        """What the gpu can hold."""
        return None if self.block_size is None or self.num_gpu_blocks is None else self.block_size * self.num_gpu_blocks


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The few figures of a metrics page that matter; None is not said. `kv_usage` is 0..1, `process_start_s` epoch.

    `loras`: adapters that requests run with or wait for. `computed_tokens`: of prompts, not found in the cache;
    `finished`: requests; both since the process began. `ranks`: how many the page tells of.
    """

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    process_start_s: float | None = None
    cache: CacheConfig | None = None
    loras: frozenset[str] | None = None
    computed_tokens: int | None = None
    finished: int | None = None
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class ServedModels:
    """`/v1/models`: every name that may be asked for, the adapters among them, and the base model's own facts."""

    names: frozenset[str] = frozenset()
    adapters: tuple[Adapter, ...] = ()
    root: str | None = None
    max_model_len: int | None = None


def parse_metrics(page: bytes, rank: int | None = None) -> EngineMetrics:
    """The figures of one data-parallel rank, or with None those of the whole page (counts added, usage the highest).

    Never raises: a page that is no metrics page says nothing.
    """
    running = _figures(page, RUNNING, rank)
    waiting = _figures(page, WAITING, rank)
    usage = _figures(page, KV_USAGE, rank)
    starts = _figures(page, PROCESS_START, None)
    return EngineMetrics(
        running=_count(running),
        waiting=_count(waiting),
        kv_usage=min(max(usage), 1.0) if usage else None,
        process_start_s=starts[0] if starts else None,
        cache=_cache_config(page, rank),
        loras=_loras(page, rank),
        computed_tokens=_computed(page, rank),
        finished=_total(_figures(page, FINISHED, rank)),
        ranks=_ranks(page),
    )


def parse_version(page: bytes) -> str | None:
    """Of vLLM's `/version`, `{"version": "0.32.0"}`; None for anything else."""
    try:
        said = msgspec.json.decode(page, type=dict[str, str]).get("version", "")
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return said if 0 < len(said) <= 64 and said.isprintable() else None


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def parse_models(page: bytes) -> ServedModels:
    """An entry with a `parent` is a LoRA adapter; its number is its place among them, from 1. Raises `MalformedPage`.

    vLLM numbers adapters in the order of loading and never again (`openai/models/serving.py`), so the number is wrong
    after an unload; 0.10 alone hashes it, later versions the name.
    """
    try:
        cards = msgspec.json.decode(page, type=_Cards).data
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise MalformedPage(f"/v1/models is no list of models: {error}") from None
    bases = [card for card in cards if card.parent is None]
    adapters = [card for card in cards if card.parent is not None]
    lengths = [card.max_model_len for card in bases if card.max_model_len is not None and card.max_model_len > 0]
    return ServedModels(
        names=frozenset(card.id for card in cards),
        adapters=tuple(Adapter(card.id, card.root, number) for number, card in enumerate(adapters, 1)),
        root=next((card.root for card in bases if card.root), None),
        max_model_len=min(*lengths, _COUNT_MAX) if lengths else None,
    )


class _Tokenized(msgspec.Struct):
    tokens: list[int]


def parse_tokenized(page: bytes) -> tuple[int, ...]:
    """Token ids of `/tokenize` (vLLM 0.32, `serve/tokenize/protocol.py`). Raises `MalformedPage`."""
    try:
        return tuple(msgspec.json.decode(page, type=_Tokenized).tokens)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise MalformedPage(f"/tokenize answered no token ids: {error}") from None


def _lines(page: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Labels and value of every sample of one metric."""
    wanted = name.encode()
    at = page.find(wanted)
    while at >= 0:
        end = page.find(b"\n", at)
        end = len(page) if end < 0 else end
        after = at + len(wanted)
        if (at == 0 or page[at - 1 : at] == b"\n") and page[after : after + 1] in (b"{", b" "):
            labels, brace, value = page[after:end].rpartition(b"}")
            yield labels if brace else b"", value
        at = page.find(wanted, end)


def _labels(text: bytes) -> dict[str, str]:
    return {name.decode(): value.decode("utf-8", "replace") for name, value in _LABEL.findall(text)}


def _is_of_rank(labels: dict[str, str], rank: int | None) -> bool:
    """A sample that names no rank belongs to rank 0."""
    return rank is None or _rank_of(labels) == str(rank)


def _rank_of(labels: dict[str, str]) -> str:
    return next((labels[name] for name in _RANK_LABELS if name in labels), "0")


def _figures(page: bytes, names: tuple[str, ...], rank: int | None) -> list[float]:
    """The sane values of the first of `names` that the page has."""
    for name in names:
        found = [value for labels, text in _lines(page, name) if _is_of_rank(_labels(labels), rank)
                 if (value := _sane(text)) is not None]  # fmt: skip
        if found:
            return found
    return []


def _sane(text: bytes) -> float | None:
    """A finite number not below zero; a timestamp may follow it."""
    try:
        value = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _count(values: list[float]) -> int | None:
    total = sum(values)
    return int(total) if values and total <= _COUNT_MAX else None


def _total(values: list[float]) -> int | None:
    """Of counters, which may be large."""
    return int(sum(values)) if values else None


def _computed(page: bytes, rank: int | None) -> int | None:
    asked, hit = _total(_figures(page, CACHE_QUERIES, rank)), _total(_figures(page, CACHE_HITS, rank))
    return None if asked is None or hit is None else max(asked - hit, 0)


def _ranks(page: bytes) -> int:
    """Distinct ranks among the samples of `RUNNING`; one that names none is one."""
    for name in RUNNING:
        found = {_rank_of(_labels(text)) for text, _ in _lines(page, name)}
        if found:
            return len(found)
    return 0


def _cache_config(page: bytes, rank: int | None) -> CacheConfig | None:
    for name in CACHE_CONFIG:
        for text, _ in _lines(page, name):
            labels = _labels(text)
            if _is_of_rank(labels, rank):
                return CacheConfig(
                    block_size=_natural(labels.get("block_size", labels.get("page_size"))),
                    num_gpu_blocks=_natural(labels.get("num_gpu_blocks", labels.get("num_pages"))),
                    prefix_caching_hash_algo=_said(labels.get("prefix_caching_hash_algo")),
                    enable_prefix_caching={"True": True, "False": False}.get(labels.get("enable_prefix_caching", "")),
                    hash_block_size=_natural(labels.get("hash_block_size")),
                )
    return None


def _loras(page: bytes, rank: int | None) -> frozenset[str] | None:
    """The adapters are in the labels; of all label values there ever were, the one with the highest value, the time it
    was set, is how things are (vLLM 0.32 `v1/metrics/loggers.py`)."""
    samples = [(_sane(value) or 0.0, _labels(text)) for text, value in _lines(page, LORAS)]
    samples = [(value, labels) for value, labels in samples if _is_of_rank(labels, rank)]
    if not samples:
        return None
    _, latest = max(samples, key=lambda sample: sample[0])
    names = (name.strip() for label in _LORA_LABELS for name in latest.get(label, "").split(","))
    return frozenset(sorted({name for name in names if name})[:_LORAS_MAX])


def _natural(text: str | None) -> int | None:
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 10:
        return None
    return int(text) if 0 < int(text) <= _COUNT_MAX else None


def _said(text: str | None) -> str | None:
    return None if text in (None, "", "None") else text
