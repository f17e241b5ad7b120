from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.blocks.extras import Lora, PromptExtras, UnknownExtra, event_extra, prompt_extra
from kvatlas_common.blocks.profile import ExtraKeys

SQL = Lora("sql", 3, "/adapters/sql")


@pytest.mark.parametrize(
    ("encoding", "first", "rest"),
    [
        (ExtraKeys.LORA_ID, (3, "tenant"), (3,)),
        (ExtraKeys.LORA_NAME, ("sql", "tenant"), ("sql",)),
        (
            ExtraKeys.TAGGED,
            (("lora", "sql", "/adapters/sql"), ("cache_salt", "tenant")),
            (("lora", "sql", "/adapters/sql"),),
        ),
    ],
)
def test_adapter_in_every_block_before_the_salt_of_the_first(
    encoding: ExtraKeys, first: tuple[Any, ...], rest: tuple[Any, ...]
) -> None:
    extras = PromptExtras(SQL, "tenant")
    assert prompt_extra(encoding, extras, first=True) == first
    assert prompt_extra(encoding, extras, first=False) == rest


@pytest.mark.parametrize("encoding", ExtraKeys)
def test_no_extras_and_an_empty_salt_are_none(encoding: ExtraKeys) -> None:
    assert prompt_extra(encoding, PromptExtras(cache_salt=""), first=True) is None
    assert prompt_extra(encoding, PromptExtras(cache_salt="tenant"), first=False) is None
    assert event_extra(encoding, None, None, None, None) is None
    assert event_extra(encoding, [], None, None, None) is None


@pytest.mark.parametrize(
    ("encoding", "lora", "complaint"),
    [
        (ExtraKeys.LORA_ID, Lora("sql", None, "/p"), "'sql' is hashed by its integer id, which is not known"),
        (ExtraKeys.TAGGED, Lora("sql", 3), "'sql' is hashed with its path, which is not known"),
    ],
)
def test_an_adapter_without_the_side_that_is_hashed_is_unknown(encoding: ExtraKeys, lora: Lora, complaint: str) -> None:
    with pytest.raises(UnknownExtra, match=complaint):
        prompt_extra(encoding, PromptExtras(lora), first=False)
    with pytest.raises(UnknownExtra, match=complaint):
        event_extra(encoding, ["sql"], lora.number, lora.name, lora.path)


def test_an_adapter_of_which_an_event_tells_only_the_id_has_no_name() -> None:
    with pytest.raises(UnknownExtra, match="adapter 3 is hashed by its name"):
        event_extra(ExtraKeys.LORA_NAME, None, 3, None, None)
    assert event_extra(ExtraKeys.LORA_ID, None, 3, None, None) == (3,)


def test_every_item_of_an_event_is_tagged_with_what_it_is() -> None:
    untagged = ["sql", ["img", 2], ["img", -14], "tenant", b"\x01" * 32]
    assert event_extra(ExtraKeys.TAGGED, untagged, 3, "sql", "/p") == (
        ("lora", "sql", "/p"),
        ("mm", "img", 2),
        ("mm", "img", -14),
        ("cache_salt", "tenant"),
        ("prompt_embeds", b"\x01" * 32),
    )
    bare = (("img", 2), ("img", -14), "tenant", b"\x01" * 32)
    assert event_extra(ExtraKeys.LORA_NAME, untagged, 3, "sql", None) == ("sql", *bare)
    assert event_extra(ExtraKeys.LORA_ID, untagged, 3, "sql", None) == (3, *bare)


def test_a_salt_equal_to_the_adapters_name_stays_a_salt() -> None:
    assert event_extra(ExtraKeys.TAGGED, ["x", "x"], 1, "x", "p") == (("lora", "x", "p"), ("cache_salt", "x"))
    assert event_extra(ExtraKeys.TAGGED, ["x"], None, None, None) == (("cache_salt", "x"),)


@pytest.mark.parametrize("item", [7, None, {}, ["img"], ["img", "2"], ["img", 2, 3], [2, "img"], [], 1.5])
@pytest.mark.parametrize("encoding", ExtraKeys)
def test_shapes_that_no_version_publishes_are_unknown(encoding: ExtraKeys, item: object) -> None:
    with pytest.raises(UnknownExtra):
        event_extra(encoding, [item], None, None, None)


names = st.text(min_size=1, max_size=5)


@given(
    st.sampled_from(ExtraKeys),
    st.none() | st.builds(Lora, names, st.integers(1, 9), names),
    st.none() | st.text(max_size=5),
    st.booleans(),
)
def test_request_and_event_end_as_the_same_tuple(
    encoding: ExtraKeys, lora: Lora | None, salt: str | None, first: bool
) -> None:
    untagged = ([lora.name] if lora else []) + ([salt] if salt and first else [])
    number, name, path = (lora.number, lora.name, lora.path) if lora else (None, None, None)
    from_event = event_extra(encoding, untagged, number, name, path)
    assert from_event == prompt_extra(encoding, PromptExtras(lora, salt), first)
