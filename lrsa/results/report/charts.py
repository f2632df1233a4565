"""Charts of the HTML report: numbers placed on panels of fixed size, which the page's template draws as SVG.

What is drawn is what the figures for print draw, from the same frames, in the same colours and markers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

from lrsa.results.figures.style import HEAT, ArmStyle
from lrsa.results.grids import Grids

WIDTH, HEIGHT = 360, 240  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 26


@dataclass(frozen=True)
class Value:
    """A measured point in data units; `tip`: what is said of it, if anything."""

    x: float
    y: float
    tip: str
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """The values of one arm; `interval`: drawn as a `band`, as `bars`, or not at all; `marks`: whether points have the
    arm's marker; `thin`: raw values behind their mean.
    """

    label: str
    style: ArmStyle
    values: Sequence[Value]
    interval: str = ""
    marks: bool = True
    thin: bool = False


@dataclass(frozen=True)
class Rule:
    """A line across at a height: of an arm, dotted in its colour, or plain."""

    y: float
    label: str = ""
    style: ArmStyle | None = None


@dataclass(frozen=True)
class Axis:
    """Ends, and ticks with their labels; `log`: to which base."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: float | None = None

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        value = min(max(value, self.low), self.high)
        if self.log is None:
            return (value - self.low) / ((self.high - self.low) or 1)
        return math.log(value / self.low) / (math.log(self.high / self.low) or 1)


@dataclass(frozen=True)
class Line:
    """A drawn curve in the panel's units."""

    label: str
    style: ArmStyle
    path: str
    points: list[tuple[float, float, str]]
    band: str = ""
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    marks: bool = True
    thin: bool = False


@dataclass(frozen=True)
class Field:
    """A field of a heat map, with its text in black or white."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    text: str
    dark: bool


@dataclass(frozen=True)
class Panel:
    """One drawn panel."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    stairs: str = ""
    fields: list[Field] = field(default_factory=list)
    tips: list[tuple[float, float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Panels that share legend, axes' names and caption."""

    name: str
    title: str
    x_label: str
    y_label: str
    caption: str
    panels: list[Panel]

    @property
    def keys(self) -> list[tuple[str, ArmStyle]]:
        """The legend: each arm once."""
        return list({line.label: (line.label, line.style) for panel in self.panels for line in panel.lines}.values())


def draw_panel(
    title: str,
    curves: Iterable[Curve],
    x: Axis,
    y: Axis,
    *,
    rules: Sequence[Rule] = (),
    stairs: Sequence[tuple[float, float]] = (),
) -> Panel:
    """Place curves, rules across (data units) and a staircase (values hold until the next one begins)."""

    def across(value: float) -> float:
        return round(LEFT + x.share(value) * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for curve in curves:
        values = [value for value in curve.values if math.isfinite(value.x) and math.isfinite(value.y)]
        bounded = [value for value in values if math.isfinite(value.low) and math.isfinite(value.high)]
        band = [(across(v.x), up(v.high)) for v in bounded] + [(across(v.x), up(v.low)) for v in reversed(bounded)]
        lines.append(
            Line(
                curve.label,
                curve.style,
                _path([(across(value.x), up(value.y)) for value in values]),
                [(across(value.x), up(value.y), value.tip) for value in values if value.tip],
                f"{_path(band)}Z" if curve.interval == "band" and len(bounded) > 1 else "",
                [(across(v.x), up(v.low), up(v.high)) for v in bounded] if curve.interval == "bars" else [],
                curve.marks,
                curve.thin,
            )
        )
    steps: list[tuple[float, float]] = []
    for place, height in stairs:
        steps += [(across(place), steps[-1][1])] if steps else []
        steps.append((across(place), up(height)))
    return Panel(
        title,
        [(across(value), text) for value, text in x.ticks],
        [(up(value), text) for value, text in y.ticks],
        lines,
        [replace(rule, y=up(rule.y)) for rule in rules],
        _path(steps),
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def linear_axis(low: float, high: float, text: Callable[[float], str] = "{:,g}".format) -> Axis:
    """Round ticks around the values, about five of them."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
    return Axis(ticks[0], ticks[-1], [(tick, text(tick)) for tick in ticks])


def power_axis(values: Sequence[float], base: float, text: Callable[[float], str], pad: float = 1.08) -> Axis:
    """A logarithmic axis with ticks at the powers of `base` among positive values; of 10 over few decades, at 2 and 5
    too.
    """
    low, high = min(values) / pad, max(values) * pad
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    between = (1, 2, 5) if base == 10 and high / low < 300 else (1,)
    ticks = [base**power * factor for power in range(first, last + 1) for factor in between]
    return Axis(low, high, [(tick, text(tick)) for tick in ticks if low <= tick <= high], base)


def draw_grids(grids: Grids, name: str, title: str, caption: str) -> Chart:
    """Heat maps as a chart."""
    colours = mpl.colormaps[HEAT]
    low, high = grids.scale
    panels = []
    for grid in grids.panels:
        rows, columns = grid.means.shape
        width, height = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / rows
        fields, tips = [], []
        for i, j in np.ndindex(rows, columns):
            mean = float(grid.means[i, j])
            if math.isnan(mean):
                continue
            x, y, share = LEFT + j * width, TOP + i * height, (mean - low) / ((high - low) or 1)
            fits = width > 30 and height > 13
            text = f"{mean:.{grids.metric.digits}f}"
            fields.append(
                Field(round(x, 1), round(y, 1), round(width - 1, 1), round(height - 1, 1), to_hex(colours(share)),
                      text if fits else "", share < 0.55)
            )  # fmt: skip
            interval = grid.intervals.get((i, j))
            said = (
                f"{text}, n = {int(grid.counts[i, j])}"
                if interval is None
                else interval.text(grids.metric.scale, grids.metric.digits)
            )
            where = f"{grids.row_label} {grid.rows[i]}, {grids.column_label} {grid.columns[j]}"
            tips.append((round(x + width / 2, 1), round(y + height / 2, 1), f"{where}: {said}"))
        x_ticks = [(round(LEFT + (j + 0.5) * width, 1), text) for j, text in enumerate(grid.columns)]
        y_ticks = [(round(TOP + (i + 0.5) * height, 1), text) for i, text in enumerate(grid.rows)]
        panels.append(Panel(" · ".join(grid.title), x_ticks, y_ticks, fields=fields, tips=tips))
    return Chart(name, title, grids.column_label, grids.row_label, caption, panels)
