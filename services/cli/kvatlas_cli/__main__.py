"""The `kvatlas` command.

Services read their own settings (flags, `KVATLAS_*`, file); the other commands are small and use argparse.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import kvatlas_indexer.__main__ as indexer
import kvatlas_router.__main__ as router
from kvatlas_cli import audit, demo, doctor, lookup, record, up

SERVICES: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "up": (up.main, "indexer and router in one process; --simulate N adds simulated engines"),
    "indexer": (indexer.main, "one indexer shard: KV events in, lookups out"),
    "router": (router.main, "one router: requests in, to the engine that holds their prefix"),
}
TOOLS: dict[str, tuple[ModuleType, str]] = {
    "demo": (demo, "simulated engines: the acceptance check, and precise against random routing"),
    "lookup": (lookup, "which engines hold a prompt's prefix, and why one is chosen"),
    "doctor": (doctor, "what is wrong with a live set-up, why, and the exact change to make"),
    "record": (record, "capture a live engine's events and requests, for an audit"),
    "audit": (audit, "hold the index to a captured engine, request by request"),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in SERVICES:
            return SERVICES[words[0]][0](words[1:])
        arguments = _parser().parse_args(words)
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvatlas",
        description="Tells which inference engine already holds the KV cache of a prompt, and routes requests there.",
        epilog="kvatlas COMMAND -h tells more of each.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, text) in SERVICES.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, (module, text) in TOOLS.items():
        command = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
