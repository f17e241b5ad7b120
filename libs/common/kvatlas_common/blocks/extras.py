"""What a block's hash covers besides its tokens: adapter, multimodal content, cache salt.

Extra keys come to us twice, and must end as the same tuple: from a request (`prompt_extra`) and from an event
(`event_extra`). In a hash they are None or a tuple in a fixed order: adapter, multimodal items, salt (of the first
block only), digest of prompt embeddings. vLLM 0.32 tags each item with what it is; events, and the hashes of earlier
versions, carry the bare values. Source: vLLM 0.32 v1/core/kv_cache_utils.py, `generate_block_hash_extra_keys` and
`to_event_extra_keys`; the adapter's integer id: 0.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvatlas_common.blocks.profile import ExtraKeys

LORA, MULTIMODAL, SALT, EMBEDS = "lora", "mm", "cache_salt", "prompt_embeds"
TAGS = (LORA, MULTIMODAL, SALT, EMBEDS)

Extra = tuple[Any, ...]


class UnknownExtra(ValueError):
    """What an engine hashes for an adapter or another extra cannot be known from what is at hand."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter. Each version hashes another side of it: `number` 0.10, `name` later, name and `path` 0.32."""

    name: str
    number: int | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class PromptExtras:
    """Extras of a whole request. An empty salt counts as none, as in vLLM."""

    lora: Lora | None = None
    cache_salt: str | None = None


def prompt_extra(encoding: ExtraKeys, extras: PromptExtras, first: bool) -> Extra | None:
    """What goes into the hash of a block of a request; `first`: of its first block.

    Raises `UnknownExtra` where the adapter lacks the side of it that is hashed.
    """
    items: Extra = ()
    if extras.lora is not None:
        items += (_lora_item(encoding, extras.lora),)
    if first and extras.cache_salt:
        items += ((SALT, extras.cache_salt) if encoding is ExtraKeys.TAGGED else extras.cache_salt,)
    return items or None


def event_extra(
    encoding: ExtraKeys,
    untagged: Sequence[Any] | None,
    lora_id: int | None,
    lora_name: str | None,
    lora_path: str | None,
) -> Extra | None:
    """What went into the hash of one block, from the event that announced it.

    `untagged`: the block's entry of `extra_keys`, None where the event has none (all events before 0.22: salts and
    multimodal content are invisible there, and the result is then without them). `lora_path` is not in the event: it is
    `root` of the adapter in the engine's `/v1/models`. Raises `UnknownExtra` where that does not suffice, or where an
    item has a shape no known version publishes.
    """
    lora: Extra = ()
    if lora_id is not None or lora_name is not None:
        lora = (_lora_item(encoding, Lora(lora_name or "", lora_id, lora_path)),)
    rest = list(untagged or ())
    if lora_name is not None and rest and rest[0] == lora_name:
        del rest[0]
    items = lora + tuple(_tagged(item) if encoding is ExtraKeys.TAGGED else _bare(item) for item in rest)
    return items or None


def _lora_item(encoding: ExtraKeys, lora: Lora) -> Any:
    if encoding is ExtraKeys.LORA_ID:
        if lora.number is None:
            raise UnknownExtra(f"adapter {lora.name!r} is hashed by its integer id, which is not known")
        return lora.number
    if not lora.name:
        raise UnknownExtra(f"adapter {lora.number} is hashed by its name, which is not known")
    if encoding is ExtraKeys.LORA_NAME:
        return lora.name
    if lora.path is None:
        raise UnknownExtra(f"adapter {lora.name!r} is hashed with its path, which is not known")
    return (LORA, lora.name, lora.path)


def _bare(item: Any) -> Any:
    match item:
        case str() | bytes():
            return item
        case [str() as identifier, int() as offset]:
            return (identifier, offset)
    raise UnknownExtra(f"an extra key of type {type(item).__name__} that no known vLLM publishes")


def _tagged(item: Any) -> Extra:
    match _bare(item):
        case str() as salt:
            return (SALT, salt)
        case bytes() as digest:
            return (EMBEDS, digest)
        case (identifier, offset):
            return (MULTIMODAL, identifier, offset)
    raise AssertionError(item)  # `_bare` returns nothing else
