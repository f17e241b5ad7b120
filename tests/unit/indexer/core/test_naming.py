"""What engines are named by: profiles proven, discovered, refuted; keys recomputed, and renamed back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.extras import Lora, PromptExtras
from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import FIXED_SEED, Algorithm, ExtraKeys, recomputed
from kvatlas_common.events.types import BlockStored, Event
from kvatlas_common.findings import Finding
from kvatlas_common.fleet import Adapter
from kvatlas_indexer.core import naming as naming_module
from kvatlas_indexer.core.match import GroupRule
from kvatlas_indexer.core.naming import UNPROVEN_ROOTS_MAX, Expected, Mode, Naming
from tests.unit.indexer.core.published import SIZE, UNKNOWABLE, Publisher, decoded, profile, removal

ADA = Adapter("ada", "/srv/ada", 1)
CONFIGURED = Expected(Algorithm.SHA256_CBOR, "42", SIZE)


def told(naming: Naming, *events: Event) -> list[Finding]:
    findings, _ = naming.study(events, {})
    return findings


def held(naming: Naming, event: BlockStored) -> list[int]:
    """Studied and stored, as the engine does it."""
    naming.study([event], {})
    return list(naming.stored(event))


def prompt(number: int, blocks: int = 2) -> list[int]:
    return [number * 100 + n for n in range(blocks * SIZE)]


# -- proven ------------------------------------------------------------------------------------------------------------


def test_a_root_proves_what_is_configured() -> None:
    naming = Naming(CONFIGURED)
    assert told(naming, Publisher(profile()).event(prompt(1))) == []
    assert (naming.profile, naming.verified, naming.mode, naming.block_size) == (profile(), True, Mode.OWN, SIZE)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("seed", ["42", "0", FIXED_SEED])
def test_a_root_tells_every_algorithm_with_a_seed_people_set(algorithm: Algorithm, seed: str) -> None:
    extra_keys = ExtraKeys.LORA_ID if algorithm is Algorithm.SHA256_CBOR_64BIT else ExtraKeys.TAGGED
    used = profile(algorithm, seed, extra_keys=extra_keys)
    naming = Naming()
    assert told(naming, Publisher(used).event(prompt(1))) == []
    assert (naming.profile, naming.verified) == (used, True)


def test_what_is_no_root_proves_nothing_and_is_not_wrong() -> None:
    naming = Naming(CONFIGURED)
    event = Publisher(profile()).event(prompt(1), since=1)
    assert told(naming, event) == []
    assert (naming.verified, naming.mode) == (False, Mode.OWN)
    assert naming.stored(event) == event.keys


def test_only_a_full_attention_group_tells_where_there_is_one() -> None:
    naming = Naming(CONFIGURED)
    window = Publisher(profile(seed=UNKNOWABLE)).stored(prompt(1)) | {
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 8,
        "group_idx": 1,
    }
    rules = {0: GroupRule.of("full_attention", None)}
    naming.study([decoded(window)], rules)
    assert (naming.verified, naming.mode) == (False, Mode.OWN)


def test_a_seed_another_engine_of_the_fleet_has_proven_is_tried() -> None:
    used = profile(seed=UNKNOWABLE)
    naming = Naming(others=lambda: [used])
    told(naming, Publisher(used).event(prompt(1)))
    assert (naming.profile, naming.verified) == (used, True)


@pytest.mark.parametrize(
    ("expected", "named"),
    [
        (Expected(Algorithm.SHA256_CBOR, "7", SIZE), ["hashSeed: 42"]),
        (Expected(Algorithm.SHA256, "42", SIZE), ["prefixCachingHashAlgo: sha256_cbor"]),
        (Expected(Algorithm.SHA256_CBOR, "42", 16), [f"blockSize: {SIZE}"]),
        (Expected(None, None, 16), [f"blockSize: {SIZE}"]),
        (Expected(None, "7", 16), ["hashSeed: 42", f"blockSize: {SIZE}"]),
        (Expected(Algorithm.XXHASH, "7", 16), ["hashSeed: 42", "prefixCachingHashAlgo: sha256_cbor", "blockSize: 4"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_set(expected: Expected, named: list[str]) -> None:
    naming = Naming(expected)
    text = " ".join(finding.change for finding in told(naming, Publisher(profile()).event(prompt(1))))
    settings_named = [s for s in ("hashSeed:", "prefixCachingHashAlgo:", "blockSize:") if s in text]
    assert all(change in text for change in named)
    assert len(settings_named) == len(named)
    assert naming.profile == profile()


@pytest.mark.parametrize("expected", [Expected(seed="42"), Expected(Algorithm.SHA256_CBOR), Expected(block_size=SIZE)])
def test_what_the_configuration_leaves_open_is_not_wrong(expected: Expected) -> None:
    assert told(Naming(expected), Publisher(profile()).event(prompt(1))) == []


# -- extra keys --------------------------------------------------------------------------------------------------------


def test_the_encoding_of_extra_keys_is_proven_by_the_first_salted_root() -> None:
    used = profile(extra_keys=ExtraKeys.LORA_NAME)
    naming, engine = Naming(CONFIGURED), Publisher(used)
    told(naming, engine.event(prompt(1)))
    assert naming.profile == profile()  # the likeliest, until something tells
    assert told(naming, engine.event(prompt(2), salt="s")) == []
    assert naming.profile == used


def test_events_without_extra_keys_are_from_before_there_were_tags() -> None:
    naming = Naming(CONFIGURED)
    told(naming, Publisher(profile(), "bare").event(prompt(1)))
    assert naming.profile == profile(extra_keys=ExtraKeys.LORA_NAME)


@pytest.mark.parametrize(
    ("extra_keys", "said"),
    [
        (ExtraKeys.LORA_ID, {"lora_id": 1}),
        (ExtraKeys.LORA_NAME, {"lora": "ada"}),
        (ExtraKeys.LORA_NAME, {"lora": "ada", "lora_id": 1}),
        (ExtraKeys.TAGGED, {"lora": "ada", "lora_path": "/srv/ada"}),
    ],
)
def test_adapters_as_each_version_hashes_them(extra_keys: ExtraKeys, said: dict[str, Any]) -> None:
    used = profile(extra_keys=extra_keys)
    naming = Naming(CONFIGURED, adapters=lambda: [ADA])
    assert told(naming, Publisher(used).event(prompt(1), **said)) == []
    assert (naming.profile, naming.verified) == (used, True)


def test_an_adapter_that_is_not_known_is_no_evidence() -> None:
    adapters: list[Adapter] = []
    naming, engine = Naming(CONFIGURED, adapters=lambda: adapters), Publisher(profile())
    for number in range(3 * UNPROVEN_ROOTS_MAX):
        assert told(naming, engine.event(prompt(number), lora="ada", lora_path="/srv/ada")) == []
    assert (naming.verified, naming.mode) == (False, Mode.OWN)
    adapters.append(ADA)
    told(naming, engine.event(prompt(99), lora="ada", lora_path="/srv/ada"))
    assert (naming.profile, naming.verified) == (profile(), True)


def test_roots_of_unknown_adapters_do_not_use_up_the_search() -> None:
    used = profile(seed="77")
    naming, engine = Naming(), Publisher(used)
    for number in range(3 * UNPROVEN_ROOTS_MAX):
        told(naming, engine.event(prompt(number), lora="ada", lora_path="/srv/ada"))
    told(naming, engine.event(prompt(99)))
    assert (naming.profile, naming.verified) == (used, True)


def test_salted_prompts_that_cannot_be_reproduced_are_reported_once() -> None:
    naming = Naming(CONFIGURED)
    told(naming, Publisher(profile()).event(prompt(1)))
    other = Publisher(profile(seed="43"))
    assert [f.code for f in told(naming, other.event(prompt(2), salt="s"))] == ["extra-keys-not-reproducible"]
    assert told(naming, other.event(prompt(3), salt="s")) == []


# -- recomputed --------------------------------------------------------------------------------------------------------


def recomputed_keys(tokens: Sequence[int], extras: PromptExtras | None = None) -> list[int]:
    return list(map(int, prompt_keys(recomputed(SIZE), [*tokens, 0], extras or PromptExtras())))


def test_hashes_nobody_can_reproduce_are_recomputed_and_that_is_said_once() -> None:
    naming, engine = Naming(CONFIGURED), Publisher(profile(seed=UNKNOWABLE))
    event = engine.event(prompt(1))
    (finding,) = told(naming, event)
    assert finding.code == "seed-differs"
    assert "PYTHONHASHSEED=42" in finding.change
    assert (naming.mode, naming.profile, naming.blind_to_extras) == (Mode.RECOMPUTE, recomputed(SIZE), False)
    assert list(naming.stored(event)) == recomputed_keys(prompt(1))
    assert told(naming, engine.event(prompt(2))) == []


TOKENS = st.lists(st.integers(0, 9), min_size=SIZE, max_size=6 * SIZE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.none() | st.just("salt"), st.none() | st.just("ada")), max_size=6))
def test_recomputed_keys_are_those_of_the_prompt(prompts: list[tuple[list[int], str | None, str | None]]) -> None:
    naming = Naming(may_reproduce=False, adapters=lambda: [ADA])
    engine = Publisher(profile(seed=UNKNOWABLE))
    stored: dict[int, int] = {}
    for tokens, salt, lora in prompts:
        extras: dict[str, Any] = {"salt": salt, "lora": lora, "lora_path": "/srv/ada" if lora else None}
        own = engine.hashes(tokens, **extras)
        since = next((n for n, key in enumerate(own) if key not in stored), len(own))
        keys = held(naming, engine.event(tokens, since=since, **extras)) if since < len(own) else []
        stored |= dict(zip(own[since:], keys, strict=True))
        wanted = recomputed_keys(
            tokens[: len(own) * SIZE], PromptExtras(Lora("ada", 1, "/srv/ada") if lora else None, salt)
        )
        assert [stored[key] for key in own] == wanted
    assert naming.unnamed == 0
    for own_key, key in stored.items():
        assert list(naming.removed(removal([own_key]))) == [key]


def test_a_block_held_twice_keeps_its_name_until_it_is_removed_twice() -> None:
    naming, engine = Naming(may_reproduce=False), Publisher(profile(seed=UNKNOWABLE))
    event = engine.event(prompt(1, 1))
    (key,) = held(naming, event)
    assert held(naming, event) == [key]
    assert [list(naming.removed(removal(event.keys))) for _ in range(2)] == [[key], [key]]
    assert list(naming.removed(removal(event.keys))) == list(event.keys)


def test_an_offload_tier_may_store_what_the_gpu_has_just_evicted() -> None:
    naming, engine = Naming(may_reproduce=False), Publisher(profile(seed=UNKNOWABLE))
    event = engine.event(prompt(1, 1))
    (key,) = held(naming, event)
    naming.removed(removal(event.keys))
    offloaded = decoded(["BlockStored", list(event.keys), None, [], 0, None, "CPU"])
    assert held(naming, offloaded) == [key]
    assert held(naming, engine.event(prompt(1, 2), since=1)) == recomputed_keys(prompt(1, 2))[1:]


def test_blocks_whose_chain_is_not_known_are_counted_and_keep_their_own_hash() -> None:
    naming, engine = Naming(may_reproduce=False), Publisher(profile(seed=UNKNOWABLE))
    late = engine.event(prompt(1, 3), since=1)
    assert held(naming, late) == list(late.keys)
    assert naming.unnamed == 2
    assert list(naming.removed(removal(late.keys))) == list(late.keys)
    naming.forget_names()
    assert naming.unnamed == 0


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming_module, "NAMES_MAX", 3)
    monkeypatch.setattr(naming_module, "DROPPED_NAMES_MAX", 2)
    naming, engine = Naming(may_reproduce=False), Publisher(profile(seed=UNKNOWABLE))
    event = engine.event(prompt(1, 5))
    keys = held(naming, event)
    assert keys == recomputed_keys(prompt(1, 5))[:3] + list(event.keys[3:])
    assert naming.unnamed == 2
    naming.removed(removal(event.keys[:3]))
    assert held(naming, decoded(["BlockStored", list(event.keys[:3]), None, [], 0, None])) == [
        event.keys[0],
        *keys[1:3],
    ]


# -- events that do not say extra keys ---------------------------------------------------------------------------------


def test_with_a_configured_profile_salted_roots_are_waited_out() -> None:
    naming, engine = Naming(CONFIGURED), Publisher(profile(extra_keys=ExtraKeys.LORA_NAME), "bare")
    for number in range(UNPROVEN_ROOTS_MAX - 1):
        assert told(naming, engine.event(prompt(number), salt="hidden")) == []
        assert (naming.mode, naming.verified) == (Mode.OWN, False)
        assert naming.profile == engine.profile  # what is configured, without the tags of later versions
    assert told(naming, engine.event(prompt(50))) == []
    assert (naming.profile, naming.verified) == (engine.profile, True)


def test_but_not_for_ever() -> None:
    naming, engine = Naming(CONFIGURED), Publisher(profile(seed=UNKNOWABLE), "bare")
    found = [told(naming, engine.event(prompt(number))) for number in range(UNPROVEN_ROOTS_MAX + 2)]
    assert [f.code for findings in found for f in findings] == ["seed-differs"]
    assert found[UNPROVEN_ROOTS_MAX - 1]
    assert (naming.mode, naming.blind_to_extras) == (Mode.RECOMPUTE, True)


def test_without_one_keys_are_recomputed_until_a_root_proves_a_profile() -> None:
    naming, engine = Naming(), Publisher(profile(extra_keys=ExtraKeys.LORA_NAME), "bare")
    salted, once, twice = engine.event(prompt(1), salt="s"), engine.event(prompt(2)), engine.event(prompt(3))
    assert told(naming, salted) == []
    assert naming.mode is Mode.RECOMPUTE
    was = dict(zip(salted.keys, naming.stored(salted), strict=True))
    findings, renamed = naming.study([once, twice], {})
    assert findings == []
    assert (naming.mode, naming.profile, naming.verified) == (Mode.OWN, engine.profile, True)
    assert sorted(renamed) == sorted((key, own) for own, key in was.items())
    assert naming.stored(twice) == twice.keys


def test_what_salted_and_unsalted_requests_share_cannot_be_renamed_back() -> None:
    naming, engine = Naming(), Publisher(profile(extra_keys=ExtraKeys.LORA_NAME), "bare")
    for event in (engine.event(prompt(1), salt="a"), engine.event(prompt(1), salt="b")):
        held(naming, event)
    _, renamed = naming.study([engine.event(prompt(9))], {})
    assert renamed == []
    assert naming.unnamed == 4


def test_too_much_is_not_renamed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming_module, "RENAMES_MAX", 3)
    naming, engine = Naming(), Publisher(profile(extra_keys=ExtraKeys.LORA_NAME), "bare")
    held(naming, engine.event(prompt(1, 4), salt="s"))
    told(naming, engine.event(prompt(2)))
    assert naming.mode is Mode.RECOMPUTE


# -- other lives -------------------------------------------------------------------------------------------------------


def test_an_engine_may_come_back_with_other_settings() -> None:
    naming = Naming(CONFIGURED)
    told(naming, Publisher(profile()).event(prompt(1)))
    naming.begin_epoch()
    assert (naming.verified, naming.block_size) == (False, None)
    other = profile(Algorithm.SHA256, "43", 2 * SIZE)
    findings = told(naming, Publisher(other).event(prompt(1, 4)))
    assert [f.code for f in findings] == ["algorithm-differs", "block-size-differs", "seed-differs"]
    assert (naming.profile, naming.verified, naming.block_size) == (other, True, 2 * SIZE)


def test_until_a_root_tells_a_new_block_size_is_believed() -> None:
    naming = Naming(CONFIGURED)
    told(naming, Publisher(profile()).event(prompt(1)))
    naming.begin_epoch()
    naming.learn_block_size(16)
    assert naming.profile == profile(block_size=16)
    assert not naming.verified


def test_a_loss_may_have_been_a_restart_with_other_settings() -> None:
    naming = Naming(Expected())
    told(naming, Publisher(profile()).event(prompt(1)))
    other = profile(seed="43")
    told(naming, Publisher(other).event(prompt(2)))
    assert naming.profile == profile()  # no reason to look
    naming.lose_track()
    told(naming, Publisher(other).event(prompt(3)))
    assert (naming.profile, naming.verified) == (other, True)


def test_a_loss_that_was_none_changes_nothing() -> None:
    naming = Naming(CONFIGURED)
    told(naming, Publisher(profile()).event(prompt(1)))
    naming.lose_track()
    assert told(naming, Publisher(profile()).event(prompt(2), salt="s")) == []
    told(naming, Publisher(profile(seed="43")).event(prompt(3)))
    assert naming.profile == profile()


def test_where_salts_are_hidden_more_than_one_root_must_refute() -> None:
    naming, engine = Naming(), Publisher(profile(extra_keys=ExtraKeys.LORA_NAME), "bare")
    told(naming, engine.event(prompt(1)))
    naming.lose_track()
    other = Publisher(profile(seed="43", extra_keys=ExtraKeys.LORA_NAME), "bare")
    for number in range(UNPROVEN_ROOTS_MAX):
        assert naming.profile == engine.profile
        told(naming, other.event(prompt(number)))
    assert (naming.profile, naming.verified) == (other.profile, True)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_blocks_too_large_for_a_search_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming_module, "SEARCH_TOKENS_MAX", SIZE - 1)
    naming = Naming()
    told(naming, Publisher(profile()).event(prompt(1)))
    assert naming.mode is Mode.RECOMPUTE


def test_searches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[object] = []
    monkeypatch.setattr(naming_module, "discover", lambda *given: searches.append(given))
    naming, engine = Naming(), Publisher(profile(seed=UNKNOWABLE))
    for number in range(50):
        held(naming, engine.event(prompt(number)))
    assert len(searches) == naming_module.FULL_SEARCHES_MAX


def test_token_ids_that_are_none_are_reported() -> None:
    naming = Naming(may_reproduce=False)
    event = Publisher(profile()).stored(prompt(1)) | {"token_ids": ["a"] * 2 * SIZE}
    assert [f.code for f in told(naming, decoded(event))] == ["unusable-event"]
