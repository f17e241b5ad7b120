"""What an engine with a given hash profile publishes, made with the plain definition of a block's hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvatlas_common.blocks.extras import event_extra
from kvatlas_common.blocks.keys import block_state, key_of, root_state
from kvatlas_common.blocks.profile import Algorithm, ExtraKeys, HashProfile
from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import BlockRemoved, BlockStored

SIZE = 4
UNKNOWABLE = "3c1f-random-9a"
"""A seed nobody tries."""


def profile(
    algorithm: Algorithm = Algorithm.SHA256_CBOR,
    seed: str = "42",
    block_size: int = SIZE,
    extra_keys: ExtraKeys = ExtraKeys.TAGGED,
) -> HashProfile:
    return HashProfile(algorithm, seed, block_size, extra_keys)


class Publisher:
    """Publishes prompts as an engine would: `form` is `map` (0.27 and later), `array` (0.22) or `bare` (before)."""

    def __init__(self, used: HashProfile, form: str = "map") -> None:
        self.profile = used
        self.form = form

    def hashes(
        self,
        tokens: Sequence[int],
        *,
        salt: str | None = None,
        lora: str | None = None,
        lora_id: int | None = None,
        lora_path: str | None = None,
    ) -> list[int]:
        size, state, found = self.profile.block_size, root_state(self.profile), list[int]()
        for start in range(0, len(tokens) // size * size, size):
            untagged = self._untagged(start, salt, lora)
            extra = event_extra(self.profile.extra_keys, untagged, lora_id, lora, lora_path)
            state = block_state(self.profile, state, tokens[start : start + size], extra)
            found.append(key_of(state))
        return found

    def stored(self, tokens: Sequence[int], *, since: int = 0, medium: str = "GPU", **extras: Any) -> dict[str, Any]:
        """The store of all blocks of `tokens` from block `since` on, as a map."""
        size, hashes = self.profile.block_size, self.hashes(tokens, **extras)
        lora, lora_id, salt = extras.get("lora"), extras.get("lora_id"), extras.get("salt")
        return {
            "type": "BlockStored",
            "block_hashes": hashes[since:],
            "parent_block_hash": hashes[since - 1] if since else None,
            "token_ids": list(tokens[since * size : len(hashes) * size]),
            "block_size": size,
            "lora_id": lora_id,
            "medium": medium,
            "lora_name": lora,
            "extra_keys": [self._untagged(n * size, salt, lora) for n in range(since, len(hashes))],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }

    def event(self, tokens: Sequence[int], **said: Any) -> BlockStored:
        found = decoded(self.written(self.stored(tokens, **said)))
        assert isinstance(found, BlockStored)
        return found

    def written(self, event: dict[str, Any]) -> Any:
        if self.form == "map":
            return event
        values = list(event.values())
        return values if self.form == "array" else values[: 8 if event["lora_name"] else 7]

    @staticmethod
    def _untagged(start: int, salt: str | None, lora: str | None) -> list[Any] | None:
        found = [*([lora] if lora else []), *([salt] if salt and start == 0 else [])]
        return found or None


def decoded(event: Any) -> Any:
    batch = decode_batch(msgspec.msgpack.encode([1.0, [event]]))
    assert batch.rejected == ()
    return batch.events[0]


def removal(keys: Sequence[int], medium: str = "GPU") -> BlockRemoved:
    found = decoded(["BlockRemoved", list(keys), medium])
    assert isinstance(found, BlockRemoved)
    return found
