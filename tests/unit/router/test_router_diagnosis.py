"""What is wrong as a router sees it: why it fails open, indexers it has lost, tokens that differ."""

from __future__ import annotations

import pytest

from kvatlas_common.findings import Code
from kvatlas_common.fleet import EngineView, Fleet, Health
from kvatlas_common.words import EngineId
from kvatlas_router.core.diagnosis import Seen, diagnose
from kvatlas_router.core.fail_opens import MANY, RECENT, WITHIN_S, FailOpens
from kvatlas_router.core.parity import SAMPLES, judge


def decided(*causes: str | None) -> list[tuple[Code, str]]:
    fail_opens = FailOpens()
    for cause in causes:
        fail_opens.decided(cause, 0.0)
    return [(found.code, found.wrong) for found in fail_opens.findings(1.0)]


def test_failing_open_is_a_finding_when_it_is_the_rule() -> None:
    assert decided(*["deadline"] * (MANY - 1)) == []
    ((code, wrong),) = decided(*["deadline"] * MANY)
    assert (code, "deadline" in wrong) == (Code.FAILING_OPEN, True)
    assert decided(*["deadline"] * MANY, *[None] * (MANY + 1)) == [], "most are routed as they should be"
    assert decided(*["deadline"] * MANY, *[None] * RECENT) == []
    assert decided(*["no-prompt"] * RECENT) == [], "which is as it should be"


def test_it_is_over_when_it_has_not_happened_for_a_while() -> None:
    fail_opens = FailOpens()
    for _ in range(MANY):
        fail_opens.decided("index-unavailable", 0.0)
    assert fail_opens.findings(WITHIN_S)
    assert fail_opens.findings(WITHIN_S + 1) == []


def test_what_cannot_be_rendered_is_told_apart() -> None:
    ((code, wrong),) = decided(*["unrenderable:chat_template"] * MANY, *["unrenderable:media"] * 2)
    assert (code, "chat_template" in wrong) == (Code.UNRENDERABLE, True)


@pytest.mark.parametrize(
    ("differs", "code"),
    [
        ((None, None, None, None, None), None),
        (("x", None, None, None, None), Code.TEMPLATE_DIFFERS),
        ((None, None, None, None, "x"), Code.TOKENIZER_DIFFERS),
        (("x", "x", "x", "x", "x"), Code.TOKENIZER_DIFFERS),
    ],
)
def test_where_plain_prompts_agree_it_is_the_template(differs: tuple[str | None, ...], code: Code | None) -> None:
    assert len(differs) == len(SAMPLES)
    found = judge("m", "/models/m", differs)
    assert (found.code if found else None) == code


def test_all_that_is_seen_is_said() -> None:
    views = [EngineView(EngineId("a:1"), "http://a:1", health=Health.DOWN), EngineView(EngineId("b:1"), "http://b:1")]
    seen = Seen(Fleet.of(views), indexers_lost={"i:1": "UNAVAILABLE"}, untokenised={"m": "no files"}, reannouncing=True)
    found = [(str(about), finding.code) for about, finding in diagnose(seen)]
    assert found == [
        ("i:1", Code.INDEXER_UNREACHABLE),
        ("a:1", Code.ENGINE_DOWN),
        ("m", Code.TOKENIZER_MISSING),
        ("", Code.REANNOUNCING_ALLOWED),
    ]
    assert [finding.code for _, finding in diagnose(Seen(Fleet()))] == [Code.NO_ENGINES]
