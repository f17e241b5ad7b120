"""Servers that tests of several modules share: started when first asked for, once."""

from tests.integration.redis_kit import cluster, single, url

__all__ = ["cluster", "single", "url"]
