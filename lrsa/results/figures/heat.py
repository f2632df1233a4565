"""Heat maps: a score by two settings of the runs, and by depth and length of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lrsa.results.figures.style import COLUMN_WIDTH, HEAT, STYLE, TEXT_WIDTH, add_caption
from lrsa.results.grids import Grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_figure(grids: Grids) -> Figure:
    """A panel a grid, each field with its mean and 95% interval. `grids`: `grids.grid_of_settings`."""
    panels, metric, scale = grids.panels, grids.metric, grids.scale
    down, across = panels[0].rows, panels[0].columns
    width = len(across) * 0.46 + 0.55  # of a field its interval must fit
    a_row = min(len(panels), max(1, int((TEXT_WIDTH - 0.9) / width)))
    figure, all_axes = _frame(-(-len(panels) // a_row), a_row, width, len(down) * 0.3 + 0.5)
    row = list(all_axes.flat)
    with mpl.rc_context(STYLE):
        for axes in row[len(panels) :]:
            axes.remove()
        row = row[: len(panels)]
        for panel, axes in zip(panels, row, strict=True):
            image = _draw(axes, panel.means, scale)
            for (i, j), interval in panel.intervals.items():
                shade = (panel.means[i, j] - scale[0]) / (scale[1] - scale[0] or 1)
                style: Any = {"ha": "center", "va": "center", "color": "black" if shade > 0.55 else "white"}
                mean, low, high = (
                    interval.number(value, metric.scale, metric.digits)
                    for value in (interval.mean, interval.low, interval.high)
                )
                axes.text(j, i - 0.12, mean, fontsize=6.5, **style)
                axes.text(j, i + 0.27, f"{low} to {high}", fontsize=4.4, **style)
            axes.set_xticks(range(len(across)), [text.replace("x", "×") for text in across])
            axes.set_yticks(range(len(down)), down)
            axes.set_title(" · ".join(panel.title), loc="left", fontweight="bold")
            axes.set_xlabel(grids.column_label)
        for axes in row[::a_row]:
            axes.set_ylabel(grids.row_label)
        _colour_bar(figure, image, row, metric.title)
        sizes = sorted({interval.size for panel in panels for interval in panel.intervals.values()})
        add_caption(figure, f"Mean, and 95% interval over examples and seeds; n a field: {', '.join(sizes)}.")
    return figure


def needle_figure(grids: Grids) -> Figure:
    """Depth by length: a row of panels a task and arm, a panel a compression. `grids`: `grids.grid_of_needles`."""
    arms = list(dict.fromkeys(panel.title[:2] for panel in grids.panels))
    columns = list(dict.fromkeys(panel.title[2] for panel in grids.panels))
    by_title = {panel.title: panel for panel in grids.panels}
    depths, lengths = grids.panels[0].rows, grids.panels[0].columns
    width = max(0.62, 0.24 * len(lengths)) + 0.3
    figure, grid = _frame(len(arms), len(columns), width, 0.095 * len(depths) + 0.5)
    several_tasks = len({task for task, _ in arms}) > 1
    every = max(1, (len(depths) - 1) // 5)
    with mpl.rc_context(STYLE):
        for i, (task, arm) in enumerate(arms):
            for j, column in enumerate(columns):
                axes, panel = grid[i][j], by_title.get((task, arm, column))
                means = np.full((len(depths), len(lengths)), np.nan) if panel is None else panel.means
                image = _draw(axes, means, grids.scale)
                last = i == len(arms) - 1
                axes.set_xticks(range(len(lengths)), lengths if last else [])
                axes.set_yticks(range(0, len(depths), every), depths[::every] if j == 0 else [])
                axes.tick_params(axis="x", labelrotation=90 if len(lengths) > 4 else 0, labelsize=6)
                if last:
                    axes.set_xlabel(grids.column_label, fontsize=7)
                if i == 0:
                    axes.set_title("full cache" if column == "full" else column.replace("x", "×"), fontsize=7.5)
            label = f"{task}\n{arm}" if several_tasks else arm
            grid[i][0].set_ylabel(f"{label}\n{grids.row_label}", fontsize=7)
        _colour_bar(figure, image, [axes for row in grid for axes in row], grids.metric.title)
        least, most = (int(end([end(panel.counts[panel.counts > 0]) for panel in grids.panels])) for end in (min, max))
        n = f"{least}" if least == most else f"{least} to {most}"
        add_caption(
            figure, f"Depth: where the answer starts, 0 at the beginning. Means of n = {n} answers a field, all seeds."
        )
    return figure


def _frame(down: int, across: int, width: float, height: float) -> tuple[Figure, Any]:
    """`down` x `across` panels of a size in inches, on a column where they fit, else on the text's width."""
    total = COLUMN_WIDTH if across * width + 0.9 <= COLUMN_WIDTH else TEXT_WIDTH
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(total, down * height + 0.45), layout="constrained")
        return figure, figure.subplots(down, across, squeeze=False)


def _draw(axes: Axes, means: np.ndarray, scale: tuple[float, float]) -> Any:
    """Fields with white lines between them; what was not measured is hatched."""
    axes.patch.set(hatch="////", edgecolor="0.8", facecolor="white")
    image = axes.pcolormesh(
        np.arange(means.shape[1] + 1) - 0.5, np.arange(means.shape[0] + 1) - 0.5, np.ma.masked_invalid(means),
        cmap=HEAT, vmin=scale[0], vmax=scale[1], edgecolors="white", linewidth=0.6,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _colour_bar(figure: Figure, image: Any, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.015, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=6.5)
    bar.set_label(label, fontsize=7)
