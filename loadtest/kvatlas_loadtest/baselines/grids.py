"""Settings tried of each baseline beside its documented defaults, the same few for every load.

The policies of the router itself have no such grid: they are run as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GRIDS: Mapping[str, Sequence[str]] = {
    "llm-d": (
        "llm-d",
        "llm-d:prefix=1:queue=1:kv=1",
        "llm-d:prefix=2:queue=1:kv=1",
        "llm-d:prefix=5:queue=1:kv=1",
    ),
    "dynamo": ("dynamo", "dynamo:weight=0.5", "dynamo:weight=2", "dynamo:weight=4"),
    "vllm-router": ("vllm-router",),
    "smg": ("smg", "smg:absolute=32", "smg:absolute=16:relative=1.2", "smg:absolute=8:relative=1.1"),
}
"""By policy; the first is the default."""
