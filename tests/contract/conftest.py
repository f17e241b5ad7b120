"""The servers of the contract: one alone, three as a cluster."""

from tests.integration.redis_kit import cluster, single

__all__ = ["cluster", "single"]
