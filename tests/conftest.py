"""What all tests share: the option that refreshes transcripts."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write the transcripts in tests/scenarios anew; read them before commit"
    )
