"""`python -m kvatlas_router`, and what `kvatlas router` runs."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from kvatlas_common.logs import setup_logs
from kvatlas_common.settings import load
from kvatlas_router.app import build
from kvatlas_router.settings import RouterSettings

DESCRIPTION = "Sends each request to the engine that already holds its prompt's KV cache. OpenAI-compatible."


def main(argv: Sequence[str] | None = None) -> int:
    settings = load(
        RouterSettings,
        sys.argv[1:] if argv is None else argv,
        os.environ,
        prog="kvatlas router",
        description=DESCRIPTION,
    )
    setup_logs(sys.stderr, settings.log_level, settings.log_format)
    try:
        _run(settings)
    except OSError as error:
        print(f"kvatlas router: {error}", file=sys.stderr)
        return 1
    return 0


def _run(settings: RouterSettings) -> None:
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(build(settings).run())


def _loop() -> asyncio.AbstractEventLoop:
    """uvloop, where the platform has it: it halves the cost of proxying."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())
