"""The `kvatlas` command.

Services read their own settings (flags, `KVATLAS_*`, file); the other commands are small and use argparse.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

SERVICES = {
    "up": ("kvatlas_cli.up", "indexer and router in one process; --simulate N adds simulated engines"),
    "indexer": ("kvatlas_indexer.__main__", "one indexer shard: KV events in, lookups out"),
    "router": ("kvatlas_router.__main__", "one router: requests in, to the engine that holds their prefix"),
}
TOOLS = {
    "demo": ("kvatlas_cli.demo", "simulated engines: the acceptance check, and precise against random routing"),
    "lookup": ("kvatlas_cli.lookup", "which engines hold a prompt's prefix, and why one is chosen"),
    "top": ("kvatlas_cli.top", "engines, what they hold and do, and how requests fare, as it changes"),
    "doctor": ("kvatlas_cli.doctor", "what is wrong with a live set-up, why, and the exact change to make"),
    "record": ("kvatlas_cli.record", "capture a live engine's events and requests, for an audit"),
    "audit": ("kvatlas_cli.audit", "hold the index to a captured engine, request by request"),
}
"""Module and what it does. Only the one that is asked for is imported: all of them take a second."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    asked = words[0] if words else ""
    try:
        if asked in SERVICES:
            service = _imported(SERVICES[asked][0])
            ended: int = service.main(words[1:])
            return ended
        tool = _imported(TOOLS[asked][0]) if asked in TOOLS else None
        arguments = _parser(asked, tool).parse_args(words)
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _imported(name: str) -> ModuleType:
    """What modules make stays: to look for garbage among it, again and again, is a sixth of the time this takes."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def _parser(asked: str, tool: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvatlas",
        description="Tells which inference engine already holds the KV cache of a prompt, and routes requests there.",
        epilog="kvatlas COMMAND -h tells more of each.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, text) in (SERVICES | TOOLS).items():
        if tool is None or name != asked:
            commands.add_parser(name, help=text, add_help=False)
            continue
        command = commands.add_parser(
            name, help=text, description=tool.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        tool.add_arguments(command)
        command.set_defaults(run=tool.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
