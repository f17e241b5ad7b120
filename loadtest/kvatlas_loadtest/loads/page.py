"""The report as one HTML page that needs nothing else: figures are in it, no script, nothing is fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2

from kvatlas_loadtest.loads.plots import Plot
from kvatlas_loadtest.loads.report import Table

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def page(
    *, title: str, facts: Mapping[str, str], leading: Sequence[Table], plots: Iterable[Plot], rest: Sequence[Table]
) -> str:
    """`leading` stand before the figures, `rest` behind them. All texts are escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"data_uri": _data_uri, "anchor": _anchor}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, leading=leading, plots=list(plots), rest=rest)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
