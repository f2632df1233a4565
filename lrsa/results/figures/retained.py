"""What is retained of the reference's score against the share of the cache's bytes that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lrsa.results.figures.frames import sizes
from lrsa.results.figures.style import PANELS_A_ROW, STYLE, ArmStyle, add_caption, label_outer, make_panels, plain_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_GAP = 7.5  # % of the axis between two names: the height of one, and a little


def retained_figure(cells: pd.DataFrame, label: str, styles: Mapping[str, ArmStyle], note: str = "") -> Figure:
    """Retention by the share of bytes kept, falling to the right on a log axis: a panel a task, all on one scale, a
    line an arm with its 95% band and its name at the end; ticks at what was measured, with its nominal compression.

    `cells`: `frames.table_frame` of `retention.build_retention`, with `kept`, the share of the full cache's bytes.
    """
    tasks = list(dict.fromkeys(cells["task"]))
    low, high = min(-5.0, float(cells["mean"].min()) - 5), max(106.0, float(cells["mean"].max()) + 5)
    figure, panels = make_panels(len(tasks))
    with mpl.rc_context(STYLE):
        for place, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
            of_task = cells[cells["task"] == task]
            axes.set_ylim(low, high)
            axes.tick_params(labelleft=place % PANELS_A_ROW == 0)  # one scale, said once
            axes.axhline(100, color="0.35", linewidth=0.7, zorder=1)
            axes.axhline(0, color="0.35", linewidth=0.7, zorder=1)
            for arm, line in of_task.groupby("arm", sort=False):
                line, style = line.sort_values("kept", ascending=False), styles[str(arm)]
                x, mean, under, over = (line[name].to_numpy(dtype=float) for name in ("kept", "mean", "low", "high"))
                axes.fill_between(x, under, over, color=style.colour, alpha=0.16, linewidth=0)
                axes.plot(x, mean, **style.line, label=str(arm), clip_on=False, zorder=3)
            axes.set_title(str(task), loc="left", fontweight="bold")
            _kept_axis(axes, of_task)
            _name_lines(axes, of_task, styles)
            plain_grid(axes)
        label_outer(panels, "bytes of KV cache kept, measured", label)
        cut = " Bands end at the panel's edge." if (cells["low"] < low).any() or (cells["high"] > high).any() else ""
        over = "examples and seeds" if (cells["seeds"] > 1).any() else "examples"
        add_caption(figure, f"Bands: 95% intervals over {over}.{cut} {sizes(cells)}. {note}".strip())
    return figure


def _kept_axis(axes: Axes, cells: pd.DataFrame) -> None:
    """Log axis from all to least, ticked at each compression's mean share."""
    ticks = cells.groupby("column")["kept"].mean().sort_values(ascending=False)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.06, float(cells["kept"].min()) / 1.06)
    axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * share:.0f}%\n{str(name).replace('x', '×')}" for name, share in ticks.items()])


def _name_lines(axes: Axes, cells: pd.DataFrame, styles: Mapping[str, ArmStyle]) -> None:
    """Each arm's name at the end of its line, in its colour; names that would overlap are moved apart."""
    ends = cells.sort_values("kept").groupby("arm", sort=False).first().sort_values("mean")
    low, high = axes.get_ylim()
    heights = apart(ends["mean"].to_numpy(dtype=float), LINE_GAP / 100 * (high - low))
    for arm, height in zip(ends.index, heights, strict=True):
        axes.annotate(
            str(arm), (1, height), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=styles[str(arm)].colour, fontsize=7.5, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def apart(heights: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Rising `heights`, moved as little as it takes (in squares) to stand at least `gap` apart."""
    groups: list[list[float]] = []  # neighbours that touch share one mean of what they stand at, less the gaps below
    for index, height in enumerate(heights):
        groups.append([float(height) - gap * index])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    level = [float(np.mean(group)) for group in groups for _ in group]
    return np.array(level) + gap * np.arange(len(level))
