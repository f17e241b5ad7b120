"""Block keys as JSON writes them: any writing of a 64-bit key is that key, anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import KEY_MASK
from kvatlas_indexer.adapters.rest_json import block_key


@given(st.integers(min_value=0, max_value=KEY_MASK))
def test_every_writing_of_a_key_is_that_key(key: int) -> None:
    writings: list[int | str] = [key, str(key), hex(key), f"0X{key:016X}"]
    assert [block_key(writing) for writing in writings] == [key] * len(writings)


@given(st.text(max_size=30) | st.integers() | st.booleans() | st.none() | st.floats())
def test_nothing_else_is_taken_for_a_key(value: object) -> None:
    text = str(value)
    try:
        meant = int(text, 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        meant = -1
    if isinstance(value, (bool, float)) or not 0 <= meant <= KEY_MASK or not text.isalnum() or not text.isascii():
        with pytest.raises(ValueError, match="is not a block key"):
            block_key(value)
    elif len(text) <= 24:
        assert block_key(value) == meant


@pytest.mark.parametrize("value", ["1_000", "+1", " 1", "0x_1", "", "0x", "٣", "1e3", True, 1.0, KEY_MASK + 1])
def test_what_python_would_take_for_a_number_is_not_enough(value: object) -> None:
    with pytest.raises(ValueError, match="is not a block key"):
        block_key(value)
