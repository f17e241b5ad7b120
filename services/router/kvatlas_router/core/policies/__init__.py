"""The ways an engine can be chosen. Each has its rule in a module of its own; `policy` makes one by its name."""

from __future__ import annotations

from enum import StrEnum

from kvatlas_router.core.policies.base import Needs, Policy, Situation
from kvatlas_router.core.policies.by_chance import PowerOfTwo, Random, RoundRobin
from kvatlas_router.core.policies.by_cost import Estimate, Precise
from kvatlas_router.core.policies.by_hash import ConsistentHash, Session
from kvatlas_router.core.policies.by_load import LeastLoad

__all__ = ["Needs", "Policy", "PolicyName", "Situation", "policy"]


class PolicyName(StrEnum):
    """What an operator can ask for."""

    PRECISE = "precise"
    ESTIMATE = "estimate"
    SESSION = "session"
    CONSISTENT_HASH = "consistent-hash"
    LEAST_LOAD = "least-load"
    POWER_OF_TWO = "power-of-two"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"


def policy(name: PolicyName, *, temperature_ms: float = 0.0) -> Policy:
    """`temperature_ms`: how much worse an engine may be and still be tried now and then; 0: never."""
    match name:
        case PolicyName.PRECISE:
            return Precise(temperature_ms)
        case PolicyName.ESTIMATE:
            return Estimate(temperature_ms)
        case PolicyName.SESSION:
            return Session()
        case PolicyName.CONSISTENT_HASH:
            return ConsistentHash()
        case PolicyName.LEAST_LOAD:
            return LeastLoad()
        case PolicyName.POWER_OF_TWO:
            return PowerOfTwo()
        case PolicyName.ROUND_ROBIN:
            return RoundRobin()
        case PolicyName.RANDOM:
            return Random()
