"""`python -m kvatlas_loadtest.loads`: loads on simulated fleets in virtual time, on real servers in real time, and the
reports of both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvatlas_loadtest.loads import run_command, simulate_command
from kvatlas_loadtest.loads.document import load, merged
from kvatlas_loadtest.loads.publish import publish
from kvatlas_loadtest.loads.terminal import WIDTH

EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        return int(args.run(args, console))
    except ImportError as error:
        print(f"{args.command}: {error}; the page needs: pip install 'kvatlas[loadtest]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.loads", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (simulate_command, run_command):
        command.add_to(commands)
    report = commands.add_parser("report", help="tables, rows and page of what was measured before")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written with --json")
    report.add_argument("--rows", type=Path, metavar="FILE", help="write what must hold as JSON")
    report.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    report.set_defaults(run=_report)
    return parser


def _report(args: argparse.Namespace, console: Console) -> int:
    document = merged([load(path) for path in args.files])
    publish(document, console, rows_to=args.rows, page_to=args.html)
    return 0


if __name__ == "__main__":
    sys.exit(main())
