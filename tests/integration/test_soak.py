"""A soak of a few seconds: everything is started, asked, sampled and ended."""

from __future__ import annotations

from pathlib import Path

from kvatlas_loadtest.soak.run import ENGINES, Wanted, run
from kvatlas_loadtest.soak.samples import Sample
from kvatlas_loadtest.soak.verdict import keys_most, verdicts


class Silent:
    def __init__(self) -> None:
        self.requests = 0

    def doing(self, text: str) -> None:
        pass

    def sampled(self, at: float, of: float, requests: int, samples: dict[str, Sample]) -> None:
        self.requests = requests


async def test_every_process_is_sampled_under_load(tmp_path: Path) -> None:
    wanted, teller = Wanted(minutes=0.05, redis=False, every_s=0.3), Silent()
    soaked = await run(wanted, tmp_path, teller)
    assert soaked.troubles == []
    assert soaked.figures.requests >= teller.requests > 0
    assert list(soaked.samples) == ["shard-0", "router-0", "router-1", "engines"]
    last = {name: its[-1] for name, its in soaked.samples.items()}
    assert all(its.resident_mb > 10 and its.files > its.sockets > 0 and its.threads > 0 for its in last.values())
    assert [name for name, its in last.items() if its.tasks] == ["shard-0", "router-0", "router-1"]
    assert 0 < keys_most(soaked.samples) <= ENGINES * wanted.blocks
    assert {verdict.process for verdict in verdicts(soaked.samples)} == set(soaked.samples)
