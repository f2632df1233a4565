"""Scores against what is kept: by measured compression, by kept bytes, as retention; and prose by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lrsa.results.figures.frames import sizes
from lrsa.results.figures.style import (
    COLOURS,
    GOLD_LINE,
    MARKERS,
    STYLE,
    ArmStyle,
    add_caption,
    add_legend,
    arm_styles,
    label_outer,
    make_panels,
    percent_axis,
    plain_grid,
    ratio_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIO_LABEL = "KV compression, measured (full / kept)"


def accuracy_figure(
    cells: pd.DataFrame, label: str = "exact match, %", styles: Mapping[str, ArmStyle] | None = None
) -> Figure:
    """A score against the measured ratio, a panel a task, a line an arm with its 95% band; dotted: the arm's floor,
    dash-dotted: with the gold documents alone.

    `cells` has a row a (task, arm, compression): `frames.table_frame` of a table; or `store.cells_frame` of one run,
    or `tables.plot_frame`, with `exact`, `exact_low`, `exact_high` as fractions. With `partner`, an arm and the one
    that it is compared with share a colour, the latter dashed. Several rows for one cell raise ValueError: join the
    seeds first.
    """
    repeated = cells.duplicated(["task", "arm", "column"])
    if repeated.any():
        row = cells[repeated].iloc[0]
        where = f"arm '{row.arm}' has several values for {row.task} at {row.column}"
        raise ValueError(f"{where}; join the seeds first (tables.build_table, tables.plot_frame)")
    if "mean" not in cells:
        found = {name: 100 * cells[f"exact{end}"] for name, end in (("mean", ""), ("low", "_low"), ("high", "_high"))}
        cells = cells.assign(**found)
    tasks, arms = list(dict.fromkeys(cells["task"])), list(dict.fromkeys(cells["arm"]))
    partner = dict(zip(cells["arm"], cells["partner"], strict=True)) if "partner" in cells else {}
    styles = styles or arm_styles(arms, partner)
    count = len({style.index for style in styles.values()})
    figure, panels = make_panels(len(tasks))
    with mpl.rc_context(STYLE):
        for task, axes in zip(tasks, panels, strict=True):
            of_task = cells[cells["task"] == task]
            for arm in arms:
                _draw_arm(axes, of_task[of_task["arm"] == arm], str(arm), styles[arm], count)
            axes.set_title(str(task), loc="left", fontweight="bold")
            ratio_axis(axes, of_task["measured_ratio"].dropna().to_numpy(dtype=float))
            if label.endswith("%"):
                percent_axis(axes, float(of_task["high"].max()))
            plain_grid(axes)
        label_outer(panels, RATIO_LABEL, label)
        add_legend(figure, panels, _baselines(cells))
        seeds = "seeds" in cells
        add_caption(figure, f"Bands: 95% intervals{_over(cells)}. {sizes(cells if seeds else cells.assign(seeds=1))}.")
    return figure


def _over(cells: pd.DataFrame) -> str:
    return " over examples and seeds" if "seeds" in cells and (cells["seeds"] > 1).any() else " over examples"


def _baselines(cells: pd.DataFrame) -> list[tuple[str, Line2D]]:
    more = []
    if cells["compression"].isna().any():
        more.append(("without the context", Line2D([], [], color="0.4", linewidth=1.0, linestyle=(0, (1, 3)))))
    if (cells["column"] == "gold").any():
        more.append(("gold documents alone", Line2D([], [], color="0.4", linewidth=0.8, linestyle=GOLD_LINE)))
    return more


def _draw_arm(axes: Axes, cells: pd.DataFrame, arm: str, style: ArmStyle, count: int) -> None:
    line = cells[cells["measured_ratio"].notna() & cells["compression"].notna()].sort_values("measured_ratio")
    x = line["measured_ratio"].to_numpy(dtype=float)
    mean, low, high = (line[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
    if not style.dashed:
        axes.fill_between(x, low, high, color=style.colour, alpha=0.16, linewidth=0)
    axes.plot(x, mean, **style.line, label=arm, clip_on=False, zorder=3)
    for floor in cells.loc[cells["compression"].isna(), "mean"].to_numpy(dtype=float):
        # dots out of step: arms whose floors are at one height show in turn
        dots = (-2.5 * style.index, (1, 2.5 * count - 1)) if count > 1 else ":"
        axes.axhline(floor, color=style.colour, linewidth=1.1, linestyle=dots, zorder=2)
    for gold in cells.loc[cells["column"] == "gold", "mean"].to_numpy(dtype=float):
        axes.axhline(gold, color=style.colour, linewidth=0.8, linestyle=GOLD_LINE, zorder=2)


def pareto_figure(cells: pd.DataFrame, label: str, styles: Mapping[str, ArmStyle], higher: bool = True) -> Figure:
    """A score against the bytes of KV cache held for each token of the prompt, a panel a task, a line an arm with 95%
    intervals; the frontier, what nothing else beats at as few bytes, is a grey staircase through ringed points.

    `cells`: `frames.table_frame` joined with `frames.held_frame`, so with `bytes_per_token`.
    """
    tasks = list(dict.fromkeys(cells["task"]))
    figure, panels = make_panels(len(tasks))
    with mpl.rc_context(STYLE):
        for task, axes in zip(tasks, panels, strict=True):
            of_task = cells[cells["task"] == task]
            for arm, line in of_task.groupby("arm", sort=False):
                line, style = line.sort_values("bytes_per_token"), styles[str(arm)]
                x, mean = (line[name].to_numpy(dtype=float) for name in ("bytes_per_token", "mean"))
                apart = np.abs(line[["low", "high"]].to_numpy(dtype=float).T - mean)
                axes.errorbar(x, mean, apart, fmt="none", ecolor=style.colour, elinewidth=0.7, alpha=0.55, zorder=2)
                axes.plot(x, mean, **style.line, label=str(arm), clip_on=False, zorder=3)
            best = frontier(of_task, higher)
            axes.step(best["bytes_per_token"], best["mean"], where="post", color="0.72", linewidth=2.6, zorder=1)
            axes.plot(
                best["bytes_per_token"], best["mean"], linestyle="none", marker="o", markersize=7.2, zorder=4,
                markerfacecolor="none", markeredgecolor="0.25", markeredgewidth=0.7, clip_on=False,
            )  # fmt: skip
            axes.set_title(str(task), loc="left", fontweight="bold")
            _bytes_axis(axes, of_task["bytes_per_token"].to_numpy(dtype=float))
            if label.endswith("%"):
                percent_axis(axes, float(of_task["high"].max()))
            plain_grid(axes)
        label_outer(panels, "KV cache held, a token of the prompt, all layers", label)
        stairs = Line2D(
            [], [], color="0.72", linewidth=2.6, marker="o", markersize=6, markerfacecolor="white",
            markeredgecolor="0.25", markeredgewidth=0.7,
        )  # fmt: skip
        add_legend(figure, panels, [("frontier of the means", stairs)])
        add_caption(figure, f"Bars: 95% intervals{_over(cells)}. {sizes(cells)}. Bytes as measured or by closed form.")
    return figure


def frontier(cells: pd.DataFrame, higher: bool = True) -> pd.DataFrame:
    """The rows that no other beats in `mean` at as few `bytes_per_token`, fewest bytes first."""
    # to three digits: caches alike but for a prompt's tokens are as large as one another
    rounded = cells["bytes_per_token"].map(lambda value: float(f"{value:.3g}"))
    ordered = cells.assign(rounded=rounded).sort_values(["rounded", "mean"], ascending=[True, not higher])
    best = ordered["mean"].cummax() if higher else ordered["mean"].cummin()
    return ordered[(ordered["mean"] == best) & ~best.duplicated()]


def _bytes_axis(axes: Axes, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    powers = 2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.12, high * 1.12)
    axes.xaxis.set_major_locator(FixedLocator([power for power in powers if low / 1.12 <= power <= high * 1.12]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))


def bytes_text(value: float) -> str:
    """`512 B`, `4 KiB`, `1.5 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def retention_figure(cells: pd.DataFrame, label: str, styles: Mapping[str, ArmStyle], note: str = "") -> Figure:
    """The share of the full cache's gain over the floor that is left, by measured ratio: a panel a task, a line an arm,
    with 95% intervals; 100 is all of it. `cells`: `frames.table_frame` of `retention.build_retention`.
    """
    tasks, arms = list(dict.fromkeys(cells["task"])), list(dict.fromkeys(cells["arm"]))
    figure, panels = make_panels(len(tasks))
    with mpl.rc_context(STYLE):
        for task, axes in zip(tasks, panels, strict=True):
            of_task = cells[(cells["task"] == task) & cells["measured_ratio"].notna()]
            top = float(min(of_task["high"].max(), 160)) if len(of_task) else 100
            for place, arm in enumerate(arms):
                line, style = of_task[of_task["arm"] == arm].sort_values("measured_ratio"), styles[str(arm)]
                aside = 1.035 ** (place - (len(arms) - 1) / 2)  # bars at one ratio stand side by side
                x, mean = line["measured_ratio"].to_numpy(dtype=float) * aside, line["mean"].to_numpy(dtype=float)
                apart = np.abs(line[["low", "high"]].to_numpy(dtype=float).T - mean)
                axes.errorbar(x, mean, apart, fmt="none", ecolor=style.colour, elinewidth=0.9, capsize=1.8, zorder=2)
                axes.plot(x, mean, **style.line, label=str(arm), zorder=3)
            axes.axhline(100, color="0.35", linewidth=0.7, zorder=1)
            axes.axhline(0, color="0.35", linewidth=0.7, zorder=1)
            axes.set_title(str(task), loc="left", fontweight="bold")
            ratio_axis(axes, of_task["measured_ratio"].to_numpy(dtype=float))
            bottom = float(max(of_task["low"].min(), -60)) if len(of_task) else 0
            axes.set_ylim(min(-4, bottom - 4), max(104, top + 4))
            plain_grid(axes)
        label_outer(panels, RATIO_LABEL, label)
        add_legend(figure, panels)
        add_caption(
            figure,
            "Retention: (score - floor) / (full - floor); 100: nothing is lost, 0: no better than without the context. "
            f"Bars: 95% intervals{_over(cells)}. {sizes(cells)}.{note}",
        )
    return figure


def position_figure(stretches: pd.DataFrame) -> Figure:
    """NLL of prose against the position in its window, a panel an arm, a line a compression with its 95% band; of
    differences to the full cache, a line at 0 for that. `stretches`: `positions.position_frame` of a table.
    """
    arms, columns = list(dict.fromkeys(stretches["arm"])), list(dict.fromkeys(stretches["column"]))
    differences = bool(stretches["difference"].any())
    figure, panels = make_panels(len(arms))
    with mpl.rc_context(STYLE):
        for arm, axes in zip(arms, panels, strict=True):
            for index, column in enumerate(columns):
                line = stretches[(stretches["arm"] == arm) & (stretches["column"] == column)].sort_values("middle")
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                x, nll, low, high = (line[name].to_numpy(dtype=float) for name in ("middle", "nll", "low", "high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
                axes.plot(
                    x, nll, color=colour, marker=marker, markeredgecolor="white", markeredgewidth=0.4, label=column
                )
            found = dict.fromkeys(stretches.loc[stretches["arm"] == arm, "n"])
            axes.set_title(str(arm), loc="left", fontweight="bold")
            axes.set_title(f"n = {', '.join(found)}", loc="right")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            plain_grid(axes)
        over = f"{'NLL above full cache' if differences else 'NLL of prose'}, nats a token"
        label_outer(panels, "token of the window", over)
        add_legend(figure, panels)
        add_caption(figure, "Bands: 95% intervals over windows (n) and seeds.")
    return figure
