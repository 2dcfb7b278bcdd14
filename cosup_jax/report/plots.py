"""Plots of report.html: SVG in the page's own colours and font."""

import contextlib
import html
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

_POINTS = 400  # points drawn per curve; more are averaged in bins
_INK, _RULE = "#000001", "#000002"  # stand for the page's own colours in a plot


class Curve(NamedTuple):
    """One line of a chart. A baseline is a single value, dashed, in the colour of its set."""

    label: str
    color: int  # N of the CSS variable --series-N, 1 to 7
    steps: Sequence[int]
    values: Sequence[float]
    baseline: bool = False
    marked: bool = False  # a dot at each point


class Score(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


class Measured(NamedTuple):
    """One metric over some rows or sizes; None where it was not measured."""

    label: str
    color: int  # N of the CSS variable --series-N, 1 to 7
    scores: Sequence[Score | None]


class Cloud(NamedTuple):
    """Points of one kind."""

    label: str
    color: int  # N of the CSS variable --series-N, 1 to 7
    points: Sequence[Sequence[float]]  # x and y of each


def chart(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """A <figure> of curves over steps. A recall or a share is drawn from 0 to 1."""
    solid = [(c.label, c.color, False) for c in curves if not c.baseline]
    dashed = [(c.label, None, True) for c in curves if c.baseline]
    with _plot(title) as (axes, file):
        for curve in curves:
            _draw(axes, curve)
        share = unit.startswith(("recall", "share"))
        drawn = np.concatenate([np.asarray(curve.values, float) for curve in curves])
        if not share and drawn.min() > 0 and drawn.max() > 300 * drawn.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0, top=1.02 if share else None)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _figure(title, unit, _themed(file.getvalue(), title), [*solid, *dashed])


def by_row(
    title: str, unit: str, rows: Sequence[str], measured: Sequence[Measured], key: str = ""
) -> str:
    """A <figure> of shares with their intervals, a row each, the first on top.

    `key` tells it from another figure of this title.
    """
    name = f"{key} {title}"
    with _plot(name, height=0.75 + 0.3 * len(rows), grid="x") as (axes, file):
        for place, one in enumerate(measured):
            nudge = 0.16 * (place - (len(measured) - 1) / 2)  # so that intervals do not hide
            found = [(row + nudge, score) for row, score in enumerate(one.scores) if score]
            _intervals(axes, one.color, found, horizontal=True)
        axes.set_yticks(range(len(rows)), rows, parse_math=False)  # a path may hold a $
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
    legend = [(one.label, one.color, False) for one in measured]
    return _figure(title, unit, _themed(file.getvalue(), name), legend)


def by_size(
    title: str, unit: str, sizes: Sequence[int], measured: Sequence[Measured], key: str = ""
) -> str:
    """A <figure> of shares with their intervals over passages searched, on a log scale."""
    name = f"{key} {title}"
    with _plot(name) as (axes, file):
        for place, one in enumerate(measured):
            nudge = 1.05 ** (place - (len(measured) - 1) / 2)  # so that intervals do not hide
            pairs = zip(sizes, one.scores, strict=True)
            found = [(size * nudge, score) for size, score in pairs if score]
            places, means = zip(*((place, score.mean) for place, score in found), strict=True)
            axes.plot(places, means, linewidth=1.2, color=_series(one.color))
            _intervals(axes, one.color, found, horizontal=False)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("passages searched")
    legend = [(one.label, one.color, False) for one in measured]
    return _figure(title, unit, _themed(file.getvalue(), name), legend)


def scatter(title: str, unit: str, clouds: Sequence[Cloud], key: str = "") -> str:
    """A <figure> of points on a plane, x and y on one scale, the first cloud at the back.

    `key` tells it from another figure of this title.
    """
    name = f"{key} {title}"
    with _plot(name, height=4.0, grid="both") as (axes, file):
        for cloud in clouds:
            x, y = np.asarray(cloud.points, float).T
            look = {"ms": 3, "mew": 0, "alpha": 0.45, "color": _series(cloud.color)}
            axes.plot(x, y, "o", **look)
        axes.set_aspect("equal", adjustable="datalim")
    legend = [(cloud.label, cloud.color, False) for cloud in clouds]
    return _figure(title, unit, _themed(file.getvalue(), name), legend)


@contextlib.contextmanager
def _plot(name: str, height: float = 2.6, grid: str = "y") -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw on, and a file that holds their SVG afterwards."""
    inks = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), _INK)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, **inks}):
        figure, file = Figure(figsize=(4.8, height), layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        yield axes, file
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.grid(axis=grid, color=_RULE, linewidth=0.6)
        axes.tick_params(which="both", length=0)
        axes.set_axisbelow(True)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def _draw(axes: Axes, curve: Curve) -> None:
    colour = _series(curve.color)
    if curve.baseline:
        axes.axhline(curve.values[0], color=colour, linewidth=1.1, dashes=(4, 3))
        return
    bins = np.array_split(np.arange(len(curve.steps)), min(len(curve.steps), _POINTS))
    steps = [np.mean(np.take(curve.steps, chosen)) for chosen in bins]
    values = [np.mean(np.take(curve.values, chosen)) for chosen in bins]
    lonely = curve.marked or len(steps) == 1  # a line through one point shows nothing
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if lonely else "", ms=3.5)


def _intervals(
    axes: Axes, color: int, found: Sequence[tuple[float, Score]], horizontal: bool
) -> None:
    places = [place for place, _ in found]
    means = [score.mean for _, score in found]
    # A resampled interval need not hold the mean where there are few items.
    reach = [
        [max(0.0, score.mean - score.low) for _, score in found],
        [max(0.0, score.high - score.mean) for _, score in found],
    ]
    x, y, error = (means, places, "xerr") if horizontal else (places, means, "yerr")
    axes.errorbar(x, y, **{error: reach}, fmt="o", ms=4, lw=1.2, color=_series(color))


def _series(number: int) -> str:
    return f"#0001{number:02d}"


def _figure(title: str, unit: str, svg: str, legend: Sequence[tuple[str, int | None, bool]]) -> str:
    """Legend entries: label, series (None: the page's soft ink), whether dashed."""
    items = dict.fromkeys(
        (label, f"var(--series-{color})" if color else "var(--soft)", "4 3" if dashed else "none")
        for label, color, dashed in legend
    )
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 20 6"><path d="M0 3H20" style="stroke: {colour}; '
        f'stroke-dasharray: {dashes}"/></svg>{html.escape(label)}</li>'
        for label, colour, dashes in items
    )
    return (
        f"<figure><figcaption>{html.escape(title)} "
        f'<span class="unit">{html.escape(unit)}</span></figcaption>{svg}<ul>{keys}</ul></figure>'
    )


def _themed(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(style|metadata).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: [^;\"]*;?", "font-size: 9px;", svg)
    svg = re.sub(r"#0001(\d\d)", lambda found: f"var(--series-{int(found[1])})", svg)
    svg = svg.replace(_INK, "var(--soft)").replace(_RULE, "var(--rule)")
    prefix = f"plot{zlib.crc32(name.encode()):08x}-"  # names are unique within one plot only
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
