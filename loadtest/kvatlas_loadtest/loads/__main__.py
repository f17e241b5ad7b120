"""`python -m kvatlas_loadtest.loads`: loads on simulated fleets, in virtual time."""

from __future__ import annotations

import sys

from kvatlas_loadtest.loads.commands import main

if __name__ == "__main__":
    sys.exit(main())
