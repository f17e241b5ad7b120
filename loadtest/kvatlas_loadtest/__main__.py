"""`python -m kvatlas_loadtest`: one simulated engine, or the replay of a capture."""

from __future__ import annotations

import sys

from kvatlas_loadtest.commands import main

if __name__ == "__main__":
    sys.exit(main())
