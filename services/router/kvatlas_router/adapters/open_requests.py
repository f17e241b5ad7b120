"""What was reported of requests that have not ended: what a new stream of reports begins with."""

from __future__ import annotations

from collections import OrderedDict

from kvatlas_common.observations import Finished, FirstToken, Observation, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb

OPEN_MAX = 8192  # requests in flight that a new stream begins with; the oldest are left out


class OpenRequests:
    """What was reported of requests that have not ended."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, list[pb.Observation]] = OrderedDict()

    def keep(self, observation: Observation, message: pb.Observation) -> None:
        match observation:
            case Routed():
                self._open[observation.request_id] = [message]
                if len(self._open) > OPEN_MAX:
                    self._open.popitem(last=False)
            case FirstToken():
                if (told := self._open.get(observation.request_id)) is not None:
                    told.append(message)
            case Finished():
                self._open.pop(observation.request_id, None)

    def again(self) -> list[pb.Observation]:
        """As a stream begins with them."""
        messages: list[pb.Observation] = []
        for routed, *more in self._open.values():
            message = pb.Observation()
            message.CopyFrom(routed)
            message.routed.again = True
            messages += [message, *more]
        return messages
