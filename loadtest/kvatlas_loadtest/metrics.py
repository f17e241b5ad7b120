"""The lines of vLLM 0.32's `/metrics` that routers read, with its names and labels (0.10's where they differ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvatlas_loadtest.rank import EngineRank

_Families: TypeAlias = dict[str, tuple[str, Callable[[EngineRank], float]]]


def metrics_page(ranks: Sequence[EngineRank], model: str, hash_algorithm: str, started_at: float) -> str:
    """Prometheus text; `started_at` in seconds since the epoch, of this life of the engine."""
    page = [
        _family("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds."),
        f"process_start_time_seconds {started_at:.6f}",
    ]
    gauges: _Families = {
        "num_requests_running": ("Number of requests in model execution batches.", lambda r: r.core.running),
        "num_requests_waiting": ("Number of requests waiting to be processed.", lambda r: r.core.waiting),
        "kv_cache_usage_perc": ("KV-cache usage. 1 means 100 percent usage.", lambda r: r.core.usage),
    }
    counters: _Families = {
        "prefix_cache_queries": ("Prefix cache queries, in tokens.", lambda r: r.core.counters.cache_queries),
        "prefix_cache_hits": ("Prefix cache hits, in cached tokens.", lambda r: r.core.counters.cache_hits),
        "num_preemptions": ("Preempted requests.", lambda r: r.core.counters.preemptions),
        "prompt_tokens": ("Prefill tokens processed.", lambda r: r.core.counters.prompt_tokens),
        "generation_tokens": ("Generation tokens processed.", lambda r: r.core.counters.generated_tokens),
    }
    for kind, families, suffix in (("gauge", gauges, ""), ("counter", counters, "_total")):
        for name, (meaning, value) in families.items():
            page.append(_family(f"vllm:{name}{suffix}", kind, meaning))
            page += [f"vllm:{name}{suffix}{{{_labels(rank, model)}}} {float(value(rank))}" for rank in ranks]
    page.append(_family("vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig"))
    for rank in ranks:
        limits = rank.core.limits
        config = (
            f'block_size="{limits.block_size}",enable_prefix_caching="True",engine="{rank.number}",'
            f'num_gpu_blocks="{limits.num_blocks}",prefix_caching_hash_algo="{hash_algorithm}"'
        )
        page.append(f"vllm:cache_config_info{{{config}}} 1.0")
    return "\n".join(page) + "\n"


def _family(name: str, kind: str, meaning: str) -> str:
    return f"# HELP {name} {meaning}\n# TYPE {name} {kind}"


def _labels(rank: EngineRank, model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'engine="{rank.number}",model_name="{escaped}"'
