"""Draws quantities over training steps as small inline SVG.

Colours are the page's, so that dark mode works: matplotlib draws in placeholder colours, and
`_inline` replaces each by a CSS variable (page.css defines them).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lpl_pretrain.report.record import Series

INK = "#010101"
GRID = "#020202"
EVENT = "#030303"
DASHES: list[tuple[float, ...]] = [(), (4, 1.6), (1.2, 1.4), (5, 1.4, 1.2, 1.4)]
"""Lengths of dashes and gaps, in line widths; the colours repeat with the next entry."""
WIDTH = 1.6
"""Width of a line, points."""
COLOURS = ["#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006"]
VARIABLES = {
    INK: "--muted",
    GRID: "--line",
    EVENT: "--event",
    **{colour: f"--series-{i + 1}" for i, colour in enumerate(COLOURS)},
}
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lpl-pretrain",
    "font.family": ["sans-serif"],
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": WIDTH,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
}
MAX_POINTS = 600
"""Points of a line; longer series are thinned out."""
MIN_SMOOTHED_POINTS = 12
"""Shorter series are drawn without a running mean."""
SIZE_IN = (5.2, 2.5)
X_LABEL = "training step"


@dataclass(frozen=True)
class Chart:
    """One set of axes."""

    title: str
    lines: dict[str, Series]
    """Series by their names in the legend."""
    unit: str = ""
    """Label of the vertical axis."""
    note: str = ""
    """Caption."""
    log: bool = False
    """Logarithmic vertical axis, where all values are positive."""
    percent: bool = False
    """Show fractions as percentages."""
    markers: bool = False
    """Mark every value; no running mean."""
    smooth: bool = True
    """Draw values faint, and a running mean on top."""
    from_zero: bool = False
    baseline: float | None = None
    """Value of a horizontal line."""
    raw: bool = True
    """Draw the values behind a running mean."""
    legend: bool = True


def draw(chart: Chart, events: Sequence[int], last_step: int) -> str:
    """SVG markup; `events`: steps of vertical marks (stops, resumes, spikes)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        for step in events:
            axes.axvline(step, color=EVENT, linewidth=0.8, dashes=(2, 2), zorder=0.5)
        if chart.baseline is not None:
            axes.axhline(chart.baseline, color=INK, linewidth=0.9, zorder=0.6)
        for number, (name, series) in enumerate(chart.lines.items()):
            _draw_series(axes, chart, name, series, number)
        _format_axes(axes, chart, last_step)
        if chart.legend and len(chart.lines) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0.0, 1.0),
                ncols=min(len(chart.lines), 4),
                borderpad=0.0,
                borderaxespad=0.2,
                columnspacing=1.4,
            )
        markup = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            markup, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _inline(markup.getvalue(), chart.title)


def swatch(number: int) -> str:
    """SVG markup of a short line, in the colour and dashes of a chart's series `number`."""
    colour, dashes = _line_style(number)
    pattern = " ".join(f"{WIDTH * length:g}" for length in dashes) or "none"
    style = (
        f'stroke="var({VARIABLES[colour]})" stroke-width="{WIDTH + 0.6:g}" '
        f'stroke-dasharray="{pattern}"'
    )
    return (
        '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4H26" '
        f"{style}/></svg>"
    )


def _line_style(number: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of a chart's series `number`."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a fortieth of the series on either side, over less at the ends.

    NaN and infinity are left out.
    """
    half = max(1, len(values) // 40)
    sums = [0.0]
    counts = [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [
        (sums[stop] - sums[start]) / (counts[stop] - counts[start])
        if counts[stop] > counts[start]
        else math.nan
        for start, stop in ends
    ]


def _draw_series(axes: Axes, chart: Chart, name: str, series: Series, number: int) -> None:
    steps = series.steps
    raw = series.values
    colour, dashes = _line_style(number)
    line: dict[str, Any] = {
        "color": colour,
        "label": name,
        "linestyle": (0, dashes) if dashes else "-",
    }
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    if chart.markers or not chart.smooth or len(steps) < MIN_SMOOTHED_POINTS:
        axes.plot(
            steps[::stride],
            raw[::stride],
            **line,
            marker="o" if chart.markers or len(steps) < 3 else None,
            markersize=4,
        )
        _draw_error_bars(axes, series, colour)
        return
    if chart.raw:
        axes.plot(steps[::stride], raw[::stride], color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(steps[::stride], smoothed(raw)[::stride], **line)


def _draw_error_bars(axes: Axes, series: Series, colour: str) -> None:
    known = [
        (step, value, bar)
        for step, value, bar in zip(series.steps, series.values, series.bars or (), strict=False)
        if bar is not None
    ]
    if not known:
        return
    steps, values, bars = zip(*known, strict=True)
    axes.errorbar(
        steps,
        values,
        yerr=list(zip(*bars, strict=True)),
        fmt="none",
        ecolor=colour,
        elinewidth=1.0,
        capsize=2.5,
    )


def _format_axes(axes: Axes, chart: Chart, last_step: int) -> None:
    finite = [
        value for series in chart.lines.values() for value in series.values if math.isfinite(value)
    ]
    if chart.log and finite and min(finite) > 0:
        axes.set_yscale("log")
        decades = math.log10(max(finite) / min(finite))
        axes.yaxis.set_major_locator(
            MaxNLocator(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 3 else (1,))
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(
            FuncFormatter(
                lambda value, _: f"{100 * value:.3g}%" if chart.percent else f"{value:,.6g}"
            )
        )
        if chart.from_zero and finite:
            axes.set_ylim(0, max(finite) * 1.08 or 1)
    axes.set_ylabel(chart.unit)
    axes.set_xlabel(X_LABEL)
    axes.set_xlim(0, last_step * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    in_thousands = last_step >= 10_000
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if in_thousands else f"{value:,.0f}")
    )


def _inline(markup: str, title: str) -> str:
    """Turn an SVG file into an <svg> element: no file header, no links, CSS colours, any width."""
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", markup, flags=re.S)
    markup = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", markup, count=1)
    markup = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", markup, count=1)
    # tags alone, never the text between them
    markup = re.sub(r"<[^>]*>", lambda tag: _plain_tag(tag[0]), markup)
    label = title.replace("&", "and").replace('"', "").replace("<", "").replace(">", "")
    return re.sub(
        r"\n\s*", "\n", markup.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    ).strip()


def _plain_tag(tag: str) -> str:
    """Drop namespaces and excess digits of one tag; replace fonts and placeholder colours."""
    tag = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag
