"""What `kvatlas top` makes of what the services say, and that they say it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from kvatlas_cli.__main__ import main
from kvatlas_cli.top import COUNTED, Look, counters, shown, traffic
from tests.unit.cli.deployment_kit import Deployment, deployed

PAGE = """# HELP kvatlas_router_requests_total requests
# TYPE kvatlas_router_requests_total counter
kvatlas_router_requests_total{outcome="ok",path="/v1/completions"} 7.0
kvatlas_router_requests_total{outcome="cut",path="/v1/completions"} 2.0
# HELP kvatlas_router_first_byte_seconds time
# TYPE kvatlas_router_first_byte_seconds histogram
kvatlas_router_first_byte_seconds_bucket{le="+Inf"} 9.0
kvatlas_router_first_byte_seconds_count 9.0
kvatlas_router_first_byte_seconds_sum 4.5
# HELP kvatlas_router_in_flight requests
# TYPE kvatlas_router_in_flight gauge
kvatlas_router_in_flight 3.0
"""


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed() as made:
        yield made


def counted(**values: float) -> dict[str, float]:
    return dict.fromkeys(COUNTED, 0.0) | {"in_flight": 0.0} | values


def engine(name: str, held: int | None, **also: object) -> dict[str, object]:
    flying = {"prefilling": 1, "prefill_tokens": 700, "decoding": 2}
    load = {"running": 4, "waiting": 5, "kv_usage": 0.25, "scraped_at": 1.0, "in_flight": flying}
    blocks = None if held is None else {"gpu": held, "cpu": 0}
    return {"id": name, "health": "ready", "sync": "exact", "load": load, "blocks": blocks} | also


def text(before: Look | None, now: Look) -> str:
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(shown(before, now))
    return captured.get()


def test_counters_are_summed_over_their_labels() -> None:
    assert counters(PAGE) == counted(requests=9, first_bytes=9, first_byte_s=4.5, in_flight=3)


def test_traffic_is_what_came_since_the_look_before() -> None:
    before = Look(10.0, counted=counted(requests=5, first_bytes=5, first_byte_s=5.0, cuts=1, prompt_tokens=100))
    after = counted(
        requests=25, first_bytes=15, first_byte_s=6.0, cuts=3, in_flight=4, prompt_tokens=300, cached_tokens=150
    )
    found = traffic(before, Look(12.0, counted=after))
    assert found is not None
    assert (found.requests_per_s, found.in_flight) == (10.0, 4)
    assert found.first_byte_ms == pytest.approx(100.0)
    assert found.cached_share == 0.75
    assert found.troubles == {"retries": 0, "cuts": 2, "fail_opens": 0, "shed": 0}


def test_a_router_that_has_started_again_is_counted_from_its_start() -> None:
    found = traffic(Look(10.0, counted=counted(requests=500)), Look(12.0, counted=counted(requests=4)))
    assert found is not None
    assert found.requests_per_s is None
    assert traffic(None, Look(12.0)) is None


def test_what_is_shown() -> None:
    past = Look(1.0, engines=(engine("a:1", 10), engine("b:1", None)))
    now = Look(
        2.0,
        engines=(engine("a:1", 1234, sync="inexact"), engine("b:1", None, health="down")),
        findings=({"code": "seed-wrong"},),
        counted=counted(requests=3, cuts=2, in_flight=1),
        errors=("nobody listens at http://x",),
    )
    lines = text(past, now).splitlines()
    assert "1 in flight" in lines[0]
    assert "2 cuts" in lines[0]
    assert "seed-wrong" in lines[1]
    assert "nobody listens" in lines[2]
    assert lines[4].split() == ["a:1", "ready", "inexact", "4", "5", "3", "25%", "1,234", "+1,224"]
    assert lines[5].split() == ["b:1", "down", "exact", "4", "5", "3", "25%", "?"]


def test_a_live_deployment(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *deployment.addresses, "--looks", "2", "--interval-s", "0.01", "--json"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) == 2
    held = {engine["id"]: engine["blocks"] for engine in looks[1]["engines"]}
    assert held[deployment.engine]["gpu"] > 0
    assert looks[1]["router"]["in_flight"] == 0
    assert looks[1]["errors"] == []
    assert main(["top", *deployment.addresses, "--looks", "1"]) == 0
    assert deployment.engine in capsys.readouterr().out


def test_one_who_does_not_answer_is_named_and_the_other_is_shown(
    deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--indexer", deployment.indexer, "--admin", deployment.public]
    assert main(["top", *wrong, "--looks", "1"]) == 0
    shown_now = capsys.readouterr().out
    assert deployment.engine in shown_now
    assert "--admin" in shown_now


def test_nobody_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--indexer", "", "--admin", ""]) == 2
    assert "--indexer" in capsys.readouterr().err
