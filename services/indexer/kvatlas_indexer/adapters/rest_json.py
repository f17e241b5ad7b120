"""The REST API's JSON: what may come in, and our types as they go out.

Block keys are unsigned 64-bit integers, and JavaScript's numbers are exact to 53 bits only. So keys go out as decimal
strings, always; they come in as numbers, or as strings in decimal or (`0x...`) hexadecimal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvatlas_common.fleet import EngineView, Load
from kvatlas_common.matching import Holder, MatchAnswer
from kvatlas_common.words import KEY_MASK, BlockKey, EngineId, Medium

TOKENS_MAX = 1_048_576
KEYS_MAX = 65_536
BLOCKS_MAX = 1_024
ENGINES_MAX = 4_096

Json = dict[str, Any]


def block_key(value: object) -> BlockKey:
    """Raises `ValueError` that quotes the value."""
    key: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        key = value
    elif isinstance(value, str) and len(value) <= 24 and value.isascii():
        digits = value.lower()
        if digits.isdigit():
            key = int(digits)
        elif digits.startswith("0x") and digits[2:].isalnum():
            key = _from_hex(digits[2:])
    if key is None or not 0 <= key <= KEY_MASK:
        shown = value if isinstance(value, int) else str(value)[:32]
        raise ValueError(f"{shown!r} is not a block key: an unsigned 64-bit integer, as a number or as a string")
    return BlockKey(key)


def _from_hex(digits: str) -> int | None:
    try:
        return int(digits, 16)
    except ValueError:
        return None


Key = Annotated[int, BeforeValidator(block_key)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 32)]
Engine = Annotated[EngineId, BeforeValidator(lambda value: EngineId.parse(str(value)))]


class MatchBody(BaseModel):
    """`POST /v1/match`: a prompt as block keys (of one hash profile) or as token ids.

    `estimate`: answer from where prompts were routed, not from the index.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: str = Field(min_length=1, max_length=1024)
    keys: list[Key] | None = Field(None, max_length=KEYS_MAX)
    token_ids: list[TokenId] | None = Field(None, max_length=TOKENS_MAX)
    profile: str | None = Field(None, max_length=2048)
    cache_salt: str | None = Field(None, max_length=4096)
    engines: list[Engine] = Field(default_factory=list, max_length=ENGINES_MAX)
    estimate: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> MatchBody:
        if (self.keys is None) == (self.token_ids is None):
            raise ValueError("give either keys or token_ids")
        if self.keys is not None and self.cache_salt is not None:
            raise ValueError("cache_salt goes with token_ids: keys have it in them already")
        return self


class BlocksBody(BaseModel):
    """`POST /v1/blocks`: who holds each of these blocks. `model` may be left out where all engines serve the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, min_length=1, max_length=1024)
    keys: list[Key] = Field(max_length=BLOCKS_MAX)


def engine_json(view: EngineView, load: Load, blocks: Mapping[Medium, int] | None) -> Json:
    """`blocks`: distinct blocks held per medium; null where not known."""
    return {
        "id": str(view.id),
        "url": view.url,
        "rank": view.id.rank,
        "models": sorted(view.models),
        "adapters": [{"name": a.name, "path": a.path, "number": a.number} for a in view.adapters],
        "root": view.root,
        "health": view.health,
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage": load.kv_usage,
            "scraped_at": load.scraped_at or None,
            "loras": sorted(load.loras),
            "in_flight": {
                "prefilling": load.others.prefilling,
                "prefill_tokens": load.others.prefill_tokens,
                "decoding": load.others.decoding,
            },
        },
        "profile": view.profile,
        "profile_verified": view.profile_verified,
        "block_size": view.block_size,
        "sync": view.sync,
        "inexact_reason": view.inexact_reason,
        "max_model_len": view.max_model_len,
        "kv_tokens": view.kv_tokens,
        "labels": dict(view.labels),
        "blocks": None if blocks is None else {str(medium): n for medium, n in blocks.items()},
    }


def holders_json(model: str, key: BlockKey, holders: Iterable[Holder]) -> Json:
    return {
        "key": str(key),
        "model": model,
        "holders": [
            {
                "engine": str(h.engine),
                "group": h.group,
                "medium": h.medium,
                "copies": h.copies,
                "doubtful": h.doubtful,
            }
            for h in holders
        ],
    }


def match_json(model: str, prompts: Mapping[str, list[int]], answer: MatchAnswer) -> Json:
    """`prompts`: the keys looked up, per hash profile. Engines with most blocks first."""
    return {
        "model": model,
        "prompts": [{"profile": name, "keys": [str(key) for key in keys]} for name, keys in prompts.items()],
        "engines": [
            {
                "engine": str(m.engine),
                "blocks": m.blocks,
                "media": {str(medium): n for medium, n in m.media.items()},
                "exact": m.exact,
                "doubtful": m.doubtful,
                "expected": max(m.expected, m.blocks),
            }
            for m in sorted(answer.matches, key=lambda m: (-m.blocks, m.engine))
        ],
        "unknown": [str(engine) for engine in answer.unknown],
    }
