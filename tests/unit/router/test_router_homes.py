"""Where stored responses are kept."""

from __future__ import annotations

from kvatlas_common.words import EngineId
from kvatlas_router.core.homes import ResponseHomes

A = EngineId("a:1")


def test_the_longest_unused_is_forgotten_first() -> None:
    homes = ResponseHomes(limit=2)
    homes.remember("resp_1", A)
    homes.remember("resp_2", A)
    assert homes.of("resp_1") == A
    homes.remember("resp_3", A)
    assert [homes.of(f"resp_{n}") for n in (1, 2, 3)] == [A, None, A]
    assert len(homes) == 2


def test_what_is_no_name_has_no_home() -> None:
    homes = ResponseHomes()
    assert homes.of(None) is None
    assert homes.of(["resp_1"]) is None
