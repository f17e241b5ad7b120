"""`kvatlas indexer`: one indexer process."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import uvloop

from kvatlas_common.logs import setup_logs
from kvatlas_common.tracing import open_tracing
from kvatlas_indexer.adapters.addresses import AddressUnavailable
from kvatlas_indexer.app import SERVICE, Indexer
from kvatlas_indexer.settings import IndexerSettings


def main(argv: Sequence[str]) -> int:
    """Exit status 0 after SIGTERM, 1 if an address cannot be had, 2 for settings that cannot be used."""
    settings = IndexerSettings.load(argv, os.environ)
    setup_logs(sys.stderr, settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            indexer = Indexer(settings, environ=os.environ, tracing=open_tracing(os.environ, SERVICE))
            runner.run(indexer.run())
    except AddressUnavailable as error:
        print(f"kvatlas indexer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
