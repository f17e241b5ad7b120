"""The figures of a comparison as PNG, in one style: a policy has the same colour and line in all of them.

Solid lines are the project's own policies, dashed ones the rules of others, dotted ones the same tuned otherwise; what
is precise is drawn last and thickest. Each figure has one panel per workload, and is drawn twice, on a light and on a
dark ground.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from kvatlas_loadtest.loads.comparison import CACHED, OUTPUT, TTFT_P90, Comparison, Measure
from kvatlas_loadtest.loads.figures import QUANTILES, Figures, Spread

DPI = 110
WIDTH_IN = 11.0
ACROSS = 3
NARROW = 8.0

SOLID, DASHED, DOTTED = "-", (0, (4, 1.5)), (0, (1, 1.2))
_LINES: dict[str, tuple[str, str | tuple[int, tuple[float, float]]]] = {
    "precise": ("#2f7ff0", SOLID),
    "estimate": ("#12a594", SOLID),
    "session": ("#5a9e2f", SOLID),
    "consistent-hash": ("#b8860b", SOLID),
    "bounded-hash": ("#b8860b", SOLID),
    "least-load": ("#f0812f", SOLID),
    "power-of-two": ("#d9534f", SOLID),
    "round-robin": ("#a58b7b", SOLID),
    "random": ("#8a8f98", SOLID),
    "llm-d": ("#e0559b", DASHED),
    "dynamo": ("#9b6cf0", DASHED),
    "vllm-router": ("#c99a00", DASHED),
    "smg": ("#4fb3e8", DASHED),
}
_OTHERS = ("#cf6f3c", "#6f9f9f", "#b06fb0", "#7f7fd0", "#9fa030", "#d07f9f")


@dataclass(frozen=True, slots=True)
class Ground:
    """What is drawn on, and with what."""

    paper: str
    ink: str
    faint: str


LIGHT, DARK = Ground("#ffffff", "#24292f", "#d0d7de"), Ground("#161b22", "#d6dde5", "#3a424c")


@dataclass(frozen=True, slots=True)
class Plot:
    """`light` and `dark`: PNG. `text` says what is to be seen, for those who cannot."""

    title: str
    text: str
    light: bytes
    dark: bytes


_Draw: TypeAlias = Callable[[Axes, Ground], None]


@dataclass(frozen=True, slots=True)
class _Drawing:
    """`panels` by their titles. `keyed`: with a legend of policies."""

    title: str
    text: str
    panels: Mapping[str, _Draw]
    height_in: float
    keyed: bool = True


def plots(comparison: Comparison) -> Iterator[Plot]:
    """Those for which there is something to show."""
    for drawing in _drawings(comparison):
        if drawing.panels:
            light, dark = (_png(drawing, comparison.policies, ground) for ground in (LIGHT, DARK))
            yield Plot(drawing.title, drawing.text, light, dark)


def _drawings(comparison: Comparison) -> list[_Drawing]:
    everywhere, rows_in = comparison.workloads, 0.55 + 0.21 * len(comparison.policies)
    stepped = [w for w in everywhere if any(len(f.rates) > 1 for f in _runs(comparison, w))]
    queued = [w for w in everywhere if any(f.queue for f in _runs(comparison, w))]

    def bars(measure: Measure) -> dict[str, _Draw]:
        return {w: partial(_bars, comparison=comparison, workload=w, measure=measure) for w in everywhere}

    def each(draw: Callable[..., None], workloads: Sequence[str]) -> dict[str, _Draw]:
        return {w: partial(draw, comparison=comparison, workload=w) for w in workloads}

    return [
        _Drawing(
            "P90 time to first token",
            "Median over seeds; the line shows the least and the most. Further left is better (logarithmic).",
            bars(TTFT_P90),
            rows_in,
            keyed=False,
        ),
        _Drawing(
            "Time to first token over offered load",
            "Percentiles of the requests of each stage, by its rate.",
            {
                f"{w}, P{share}": partial(_over_rate, comparison=comparison, workload=w, share=share)
                for w in stepped
                for share in (50, 90, 99)
            },
            3.0,
        ),
        _Drawing(
            "How many had their first token by when",
            "Share of requests with a first token after at most so many seconds. Further left is better.",
            each(_cdf, everywhere),
            2.7,
        ),
        _Drawing(
            "Queues over time",
            "Requests waiting for their first token, mean over the engines, of the first seed.",
            each(_queues, queued),
            2.7,
        ),
        _Drawing(
            "Balance of the engines",
            "Requests an engine has, waiting or running, averaged over time: from the least to the most loaded engine; "
            "a tick is one engine, 1 the mean. Of the first seed.",
            each(_balance, everywhere),
            rows_in,
            keyed=False,
        ),
        _Drawing(
            "Cached share of prompt tokens",
            "Dotted: what one infinite cache of the whole fleet would have served.",
            bars(CACHED),
            rows_in,
            keyed=False,
        ),
        _Drawing("Output tokens per second", "Of all engines together.", bars(OUTPUT), rows_in, keyed=False),
    ]


def _png(drawing: _Drawing, policies: Sequence[str], ground: Ground) -> bytes:
    across = min(ACROSS, len(drawing.panels))
    down = -(-len(drawing.panels) // across)
    legend_in = 0.25 + 0.22 * -(-len(policies) // 6) if drawing.keyed else 0.0
    figure = Figure((WIDTH_IN, down * drawing.height_in + legend_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor(ground.paper)
    for number, (title, draw) in enumerate(drawing.panels.items(), 1):
        axes = figure.add_subplot(down, across, number)
        draw(axes, ground)
        axes.set_title(title, fontsize=9, fontweight="bold", loc="left", color=ground.ink)
        _dress(axes, ground)
    if drawing.keyed:
        keys = [Line2D([], [], label=policy, **_line(policy, policies)) for policy in policies]
        legend = figure.legend(handles=keys, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_color(ground.ink)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=ground.paper, metadata={"Software": None})
    return out.getvalue()


def _dress(axes: Axes, ground: Ground) -> None:
    axes.set_facecolor(ground.paper)
    axes.tick_params(colors=ground.ink, labelsize=8, which="both", length=2.5)
    axes.xaxis.label.set(color=ground.ink, fontsize=8)
    axes.yaxis.label.set(color=ground.ink, fontsize=8)
    axes.grid(True, color=ground.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(ground.faint)


def _bars(axes: Axes, ground: Ground, comparison: Comparison, workload: str, measure: Measure) -> None:
    policies = comparison.policies
    for place, policy in enumerate(policies):
        found = comparison.median(policy, workload, measure)
        if found is None:
            continue
        colour = _colour(policy, policies)
        if measure.unit == "s":  # a point: on a logarithmic axis the length of a bar means nothing
            axes.plot(found.value, place, "o", color=colour, markersize=6.5)
        else:
            axes.barh(place, found.value, color=colour, height=0.7)
        axes.plot([found.low, found.high], [place, place], color=ground.ink, linewidth=1.1)
    if measure is CACHED:
        shares = [run.oracle_share for run in _runs(comparison, workload)]
        axes.axvline(median(shares), color=ground.ink, linewidth=1.2, linestyle=":")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
    if measure.unit == "s":
        _logarithmic(axes.xaxis)
    _name_rows(axes, policies)
    axes.set_xlabel({"share": "share of prompt tokens"}.get(measure.unit, f"{measure.heading}, {measure.unit}"))


def _balance(axes: Axes, ground: Ground, comparison: Comparison, workload: str) -> None:
    """Of the first seed: engines of different seeds have nothing to do with each other."""
    policies = comparison.policies
    for place, policy in enumerate(policies):
        loads = _relative_loads(comparison.cell(policy, workload))
        if not loads:
            continue
        low, high = min(loads), max(loads)
        axes.barh(place, max(high - low, 0.004), left=low, color=_colour(policy, policies), height=0.62)
        axes.plot(loads, [place] * len(loads), linestyle="", marker="|", markersize=7, color=ground.ink)
    axes.axvline(1.0, color=ground.ink, linewidth=1.0, linestyle=":")
    axes.set_xlim(left=0)
    _name_rows(axes, policies)
    axes.set_xlabel("load of an engine, mean = 1")


def _relative_loads(runs: Sequence[Figures]) -> list[float]:
    loads = [engine.load for engine in runs[0].engines.values()] if runs else []
    mean = sum(loads) / len(loads) if loads else 0.0
    return [load / mean for load in loads] if mean else []


def _name_rows(axes: Axes, policies: Sequence[str]) -> None:
    axes.set_yticks(range(len(policies)), policies)
    axes.set_ylim(len(policies) - 0.4, -0.6)


def _logarithmic(axis: XAxis | YAxis) -> None:
    """With plain numbers at 1, 2 and 5; at more places where the data span less than about a decade."""
    low, high = axis.get_data_interval()
    narrow = high < NARROW * low
    if isinstance(axis, XAxis):
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5), numticks=8))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _over_rate(axes: Axes, ground: Ground, comparison: Comparison, workload: str, share: int) -> None:
    for policy in _drawn_last(comparison.policies):
        points = _rates(comparison.cell(policy, workload), f"p{share}")
        axes.plot(*zip(*points, strict=True), **_line(policy, comparison.policies)) if points else None
    _logarithmic(axes.yaxis)
    axes.set_xlabel("requests per second")
    axes.set_ylabel(f"P{share} TTFT, s")
    axes.set_xlim(left=0)


def _rates(runs: Sequence[Figures], percentile: str) -> list[tuple[float, float]]:
    """(rate, time), medians over seeds at each rate."""
    at: dict[int, list[tuple[float, Spread]]] = {}
    for run in runs:
        for point in run.rates:
            if point.ttft is not None:
                at.setdefault(point.step, []).append((point.per_s, point.ttft))
    return sorted(
        (median(rate for rate, _ in those), median(getattr(spread, percentile) for _, spread in those))
        for those in at.values()
    )


def _cdf(axes: Axes, ground: Ground, comparison: Comparison, workload: str) -> None:
    for policy in _drawn_last(comparison.policies):
        runs = [run.ttft_quantiles for run in comparison.cell(policy, workload) if run.ttft_quantiles]
        if runs:
            times = [median(values) for values in zip(*runs, strict=True)]
            axes.plot(times, QUANTILES, **_line(policy, comparison.policies))
    _logarithmic(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("TTFT, s")
    axes.set_ylabel("of requests")


def _queues(axes: Axes, ground: Ground, comparison: Comparison, workload: str) -> None:
    for policy in _drawn_last(comparison.policies):
        runs = comparison.cell(policy, workload)
        if runs:
            points = runs[0].queue
            axes.plot([p.at_s for p in points], [p.waiting for p in points], **_line(policy, comparison.policies))
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("time, s")
    axes.set_ylabel("waiting per engine")


def _runs(comparison: Comparison, workload: str) -> list[Figures]:
    return [run for run in comparison.runs if run.workload == workload]


def _drawn_last(policies: Sequence[str]) -> list[str]:
    """In the order to be drawn: the first lie over the others."""
    return list(reversed(policies))


def _colour(policy: str, policies: Sequence[str]) -> str:
    return str(_line(policy, policies)["color"])


def _line(policy: str, policies: Sequence[str]) -> dict[str, Any]:
    """One tuned otherwise (`llm-d tuned`) has the colour of the policy it is, dotted; an unknown one a spare colour."""
    if policy in _LINES:
        colour, style = _LINES[policy]
    elif known := next((name for name in _LINES if policy.startswith(name)), None):
        colour, style = _LINES[known][0], DOTTED
    else:
        others = [name for name in policies if name not in _LINES]
        colour, style = _OTHERS[others.index(policy) % len(_OTHERS)], SOLID
    return {"color": colour, "linestyle": style, "linewidth": 2.6 if policy == "precise" else 1.4}
