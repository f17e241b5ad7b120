"""A section of a page is replaced between its markers, and nowhere else."""

from __future__ import annotations

import pytest

from kvatlas_loadtest.sections import inserted, markers

BEGIN, END = markers("chaos")


def test_the_page_is_changed_between_its_markers_only() -> None:
    other = "\n".join(markers("curves"))
    document = f"# Reliability\n{other}\n{BEGIN}\nyesterday\n{END}\nafter\n"
    changed = inserted(document, "chaos", "today\n")
    assert changed == f"# Reliability\n{other}\n{BEGIN}\ntoday\n{END}\nafter\n"
    assert inserted(changed, "chaos", "today") == changed


@pytest.mark.parametrize("document", ["# Reliability\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n"])
def test_a_page_without_a_place_is_left_alone(document: str) -> None:
    with pytest.raises(ValueError, match="there is no place"):
        inserted(document, "chaos", "today")
