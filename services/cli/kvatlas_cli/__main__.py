"""The `kvatlas` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvatlas_cli import audit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kvatlas", description="Which inference engine already holds the KV cache of a prompt?"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    auditing = commands.add_parser("audit", help="hold the index to a captured engine", description=audit.__doc__)
    audit.add_arguments(auditing)
    auditing.set_defaults(run=audit.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
