"""One sequence of an engine: what was asked, and where the scheduler stands with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvatlas_loadtest.kv_events import BlockHash, ExtraKeys


class HashChain(Protocol):
    """Names the blocks of one prompt, front to back."""

    def extend(self, token_ids: Sequence[int]) -> Sequence[BlockHash]:
        """Hashes of the next blocks; `token_ids` are whole blocks, following those of the calls before."""
        ...


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One sequence. `sample(i)` is its i-th output token; it ends after `max_tokens` of them or one of `stop_ids`."""

    id: str
    prompt: Sequence[int]
    max_tokens: int
    chain: HashChain
    sample: Callable[[int], int]
    stop_ids: Collection[int] = ()
    first_extra_keys: ExtraKeys = None  # of its first block, as events carry them
    extra_keys: ExtraKeys = None  # of every other block
    lora_name: str | None = None

    # what the scheduler keeps
    tokens: list[int] = field(init=False)
    hashes: list[BlockHash] = field(default_factory=list, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    computed: int = field(default=0, init=False)
    named: int = field(default=0, init=False)  # leading blocks that have their hash
    cached_tokens: int | None = field(default=None, init=False)  # hit when first admitted
    stopped: bool = field(default=False, init=False)
    gone: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def is_decoding(self) -> bool:
        """Whether its next step computes the token sampled last, and nothing else."""
        return len(self.tokens) - self.computed == 1 and self.computed >= len(self.prompt)

    def name_new_blocks(self, block_size: int) -> None:
        """Hashes of the blocks its tokens have filled since the last call."""
        done, full = len(self.hashes), len(self.tokens) // block_size
        if full > done:
            self.hashes.extend(self.chain.extend(self.tokens[done * block_size : full * block_size]))
