"""What routers report, handed to all who learn from it: the accuracy, the healing, the estimates and the loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvatlas_common.fleet import Fleet
from kvatlas_common.observations import Observation, Routed
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.healing import Healing
from kvatlas_indexer.core.routing import Routing


@dataclass(frozen=True, slots=True)
class Listener:
    """`contracts.Reports`. `clock` is monotonic, `wall` gives seconds since the epoch.

    `on_healed`: the index has been changed; `on_in_flight`: what routers have in flight may have.
    """

    accuracy: Accuracy
    healing: Healing
    routing: Routing
    fleet: Callable[[], Fleet]
    on_healed: Callable[[], None]
    on_in_flight: Callable[[], None]
    clock: Callable[[], float]
    wall: Callable[[], float]

    def joined(self, router: str) -> None:
        self.routing.in_flight.joined(router)
        self.on_in_flight()

    def reported(self, router: str, observation: Observation) -> None:
        self.routing.observe(router, observation, self.fleet(), self.clock())
        self.on_in_flight()
        if isinstance(observation, Routed) and observation.again:
            return  # what was predicted of it is compared by those that heard of it at the time
        self.accuracy.observe(observation)
        if self.healing.observe(observation, self.wall()):
            self.on_healed()

    def left(self, router: str) -> None:
        self.routing.in_flight.left(router, self.clock())

    def on_tick(self) -> None:
        self.routing.on_tick(self.clock(), self.fleet())
        self.on_in_flight()
