"""What a load is simulated on."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_loadtest.loads.presets import REFERENCE, EnginePreset


@dataclass(frozen=True, slots=True)
class Crash:
    """Engine number `engine` dies at `at_s`, and is back with an empty cache at `back_s`."""

    engine: int
    at_s: float
    back_s: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What a load is run on. `lost_share`: of the event messages, 0..1."""

    engines: int = 8
    routers: int = 1
    seed: int = 1
    event_delay_s: float = 0.005
    scrape_s: float = 0.2
    share_s: float = 0.005
    lost_share: float = 0.0
    replay: bool = True
    crashes: tuple[Crash, ...] = ()
    sample_s: float = 1.0
    preset: EnginePreset = REFERENCE

    def told(self) -> dict[str, float | int | str]:
        """For the record of a run."""
        return {
            "engines": self.engines,
            "routers": self.routers,
            "event_delay_s": self.event_delay_s,
            "scrape_s": self.scrape_s,
            "share_s": self.share_s,
            "lost_share": self.lost_share,
            "replay": int(self.replay),
            "crashes": ",".join(f"{c.engine}@{c.at_s:g}-{c.back_s:g}" for c in self.crashes),
        }
