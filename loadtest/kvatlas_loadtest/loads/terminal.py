"""The tables of a report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kvatlas_loadtest.loads.report import Cell, Table

WIDTH = 200
"""Where there is no terminal to ask."""


def show(console: Console, tables: Iterable[Table], *, ranges: bool = False) -> None:
    """`ranges`: with the least and the most over seeds, under each figure."""
    for table in tables:
        shown = RichTable(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
        for place, heading in enumerate(table.headings):
            shown.add_column(
                heading, justify="right" if place and heading not in table.worded else "left", no_wrap=not place
            )
        for row in table.rows:
            shown.add_row(*(_text(cell, ranges) for cell in row))
        console.print(shown)


def _text(cell: Cell, ranges: bool) -> Text:
    style = "bold red" if cell.bad else "bold green" if cell.best else ""
    text = Text(cell.text, style=style)
    if ranges and cell.range:
        text.append(f"\n{cell.range}", style="dim not bold")
    return text
