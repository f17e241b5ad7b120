"""An index in this very process, with engines that publish to it: what it costs without any wire."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.fleet import Health
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.index import KvIndex
from kvatlas_loadtest.bench.feeds import first_message, profile
from kvatlas_loadtest.bench.stub_engines import MODEL


class InProcess:
    """`engines` of them, ready, their hash profile learnt from a first block each."""

    def __init__(self, engines: int, block_size: int) -> None:
        self.engines = [EngineId(f"10.0.{n // 250}.{n % 250 + 1}:8000") for n in range(engines)]
        self.index = KvIndex(on_finding=lambda engine, finding: None)
        self._profile = profile(block_size).name
        self._said = [0] * engines
        specs = [EngineSpec(str(e), f"http://{e}", events="tcp://e:5557") for e in self.engines]
        self.index.on_specs(specs, time.time())
        for number, engine in enumerate(self.engines):
            self.index.on_facts(EngineFacts(engine, Health.READY, frozenset({MODEL})), time.time())
            self.hear(number, first_message(block_size))

    def hear(self, engine: int, payload: bytes) -> None:
        """The next message of an engine (counted from 0): from its bytes to its being visible."""
        frames = [b"kv@e@m", self._said[engine].to_bytes(8, "big"), payload]
        self.index.on_frames(frames, time.time(), peer=None, dialled=self.engines[engine], port_rank=0)
        self._said[engine] += 1

    def match(self, keys: Sequence[int]) -> MatchAnswer:
        return self.index.match(MODEL, {self._profile: keys})
