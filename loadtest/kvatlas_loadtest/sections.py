"""Sections of a page that a command writes, between two markers; all around them is written by hand."""

from __future__ import annotations


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def inserted(document: str, name: str, text: str) -> str:
    """The document with what stands between the section's markers replaced. Raises `ValueError` without them."""
    first, last = markers(name)
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"there is no place for the table: {first} and {last} are not both in it")
    return f"{head}{begin}\n{text.strip()}\n{end}{tail}"
