"""Which engine keeps which `/v1/responses` answer.

vLLM keeps a stored response in the process that made it (0.32, responses/serving.py), so a request that names one by
`previous_response_id` can only be served there. What this router saw made, it remembers; a response made through
another router goes by rendezvous, as any session.
"""

from __future__ import annotations

from collections import OrderedDict

from kvatlas_common.words import EngineId


class ResponseHomes:
    """At most `limit` responses; the longest unused is forgotten first."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._homes: OrderedDict[str, EngineId] = OrderedDict()

    def remember(self, response: str, engine: EngineId) -> None:
        self._homes[response] = engine
        self._homes.move_to_end(response)
        if len(self._homes) > self._limit:
            self._homes.popitem(last=False)

    def of(self, response: object) -> EngineId | None:
        if not isinstance(response, str) or response not in self._homes:
            return None
        self._homes.move_to_end(response)
        return self._homes[response]

    def __len__(self) -> int:
        return len(self._homes)
