"""Figures for print: accuracy by measured compression, and training loss. PDF with embedded fonts, and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from lrsa.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette (2008), told apart with any colour vision; yellow left out: too pale on white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN_WIDTH = 3.35  # inches, one column of a two-column paper
TEXT_WIDTH = 6.9
PANELS_A_ROW = 3

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "pdf.fonttype": 42,  # TrueType, as publishers ask: text stays text
    "svg.fonttype": "none",
}


def accuracy_figure(cells: pd.DataFrame) -> Figure:
    """Exact match (%) against the measured ratio, a panel a task, a line an arm with its 95% band; dotted: the arm's
    floor, dash-dotted: with the gold documents alone.

    `cells` has a row a (task, arm, compression): `store.cells_frame` of one run, or `tables.plot_frame` of a table,
    with `exact`, `exact_low`, `exact_high` as fractions; with `partner`, an arm and the one that it is compared with
    share a colour, the latter dashed. Several rows for one cell raise ValueError: join the seeds first.
    """
    repeated = cells.duplicated(["task", "arm", "column"])
    if repeated.any():
        row = cells[repeated].iloc[0]
        where = f"arm '{row.arm}' has several values for {row.task} at {row.column}"
        raise ValueError(f"{where}; join the seeds first (tables.build_table, tables.plot_frame)")
    tasks, arms = list(dict.fromkeys(cells["task"])), list(dict.fromkeys(cells["arm"]))
    partner = dict(zip(cells["arm"], cells["partner"], strict=True)) if "partner" in cells else {}
    groups = list(dict.fromkeys(partner.get(arm) or arm for arm in arms))
    figure, panels = _panels(len(tasks))
    with mpl.rc_context(STYLE):
        for task, axes in zip(tasks, panels, strict=True):
            of_task = cells[cells["task"] == task]
            for arm in arms:
                group, dashed = groups.index(partner.get(arm) or arm), bool(partner.get(arm))
                _draw_arm(axes, of_task[of_task["arm"] == arm], str(arm), group, len(groups), dashed)
            axes.set_title(str(task), loc="left", fontweight="bold")
            _ratio_axis(axes, of_task["measured_ratio"].dropna().to_numpy(dtype=float))
            _percent_axis(axes, 100 * float(of_task["exact_high"].max()))
            axes.grid(axis="y", color="0.9", linewidth=0.5)
            axes.set_axisbelow(True)
        _label_outer(panels, "KV compression, measured (full / kept)", "exact match, %")
        _legend(figure, panels, bool(cells["compression"].isna().any()), bool((cells["column"] == "gold").any()))
    return figure


def _draw_arm(axes: Axes, cells: pd.DataFrame, arm: str, index: int, count: int, dashed: bool) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    line = cells[cells["measured_ratio"].notna() & cells["compression"].notna()].sort_values("measured_ratio")
    x = line["measured_ratio"].to_numpy(dtype=float)
    mean, low, high = (100 * line[name].to_numpy(dtype=float) for name in ("exact", "exact_low", "exact_high"))
    if not dashed:
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle="--" if dashed else "-",
        marker=marker,
        markerfacecolor="white" if dashed else colour,
        markeredgecolor=colour if dashed else "white",
        markeredgewidth=0.8 if dashed else 0.4,
        label=arm,
        clip_on=False,
        zorder=3,
    )
    for floor in 100 * cells.loc[cells["compression"].isna(), "exact"].to_numpy(dtype=float):
        # dots out of step: arms whose floors are at one height show in turn
        axes.axhline(
            floor,
            color=colour,
            linewidth=1.1,
            linestyle=(-2.5 * index, (1, 2.5 * count - 1)) if count > 1 else ":",
            zorder=2,
        )
    for gold in 100 * cells.loc[cells["column"] == "gold", "exact"].to_numpy(dtype=float):
        axes.axhline(gold, color=colour, linewidth=0.8, linestyle=_GOLD, zorder=2)


def position_figure(stretches: pd.DataFrame) -> Figure:
    """NLL of prose against the position in its window, a panel an arm, a line a compression with its 95% band; of
    differences to the full cache, a line at 0 for that. `stretches`: `positions.position_frame` of a table.
    """
    arms, columns = list(dict.fromkeys(stretches["arm"])), list(dict.fromkeys(stretches["column"]))
    differences = bool(stretches["difference"].any())
    figure, panels = _panels(len(arms))
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
            sizes = dict.fromkeys(stretches.loc[stretches["arm"] == arm, "n"])
            axes.set_title(str(arm), loc="left", fontweight="bold")
            axes.set_title(f"n = {', '.join(sizes)}", loc="right")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.grid(axis="y", color="0.9", linewidth=0.5)
            axes.set_axisbelow(True)
        over = f"{'NLL above full cache' if differences else 'NLL of prose'}, nats a token"
        _label_outer(panels, "token of the window", over)
        _legend(figure, panels)
    return figure


_GOLD: Any = (0, (7, 2, 1, 2))


def loss_figure(records: Sequence[Record], names: Mapping[str, str] | None = None) -> Figure:
    """Training loss by optimiser step on a log axis, a line a run, a colour an arm. Runs without `training.loss_curve`
    are left out.

    Raises ValueError when no record has one.
    """
    curves = [
        (record.arm, curve)
        for record in records
        if (curve := (record.training or {}).get("loss_curve")) and curve["step"]
    ]
    if not curves:
        raise ValueError("no record holds a loss curve (training.loss_curve): only training runs have one")
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    figure, (axes,) = _panels(1)
    with mpl.rc_context(STYLE):
        for position, (arm, curve) in enumerate(curves):
            index = arms.index(arm)
            first = all(before != arm for before, _ in curves[:position])
            loss = np.array([np.nan if value is None else value for value in curve["loss"]], dtype=float)
            label = (names or {}).get(arm, arm) if first else "_"
            axes.plot(
                curve["step"],
                loss,
                color=COLOURS[index % len(COLOURS)],
                linewidth=1.1,
                alpha=0.9,
                label=label,
                linestyle=_DASHES[index % len(_DASHES)],
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        _label_outer([axes], "optimiser step", "loss, nats a token")
        _legend(figure, [axes])
    return figure


_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.2)), (0, (2, 1)), (0, (5, 1, 1, 1)))


def save_figure(figure: Figure, folder: str | Path, stem: str) -> list[Path]:
    """Write `<stem>.pdf` and `<stem>.png` (300 dpi); returns the paths. Same figure, same bytes: no dates, no program
    version.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.pdf", folder / f"{stem}.png"]
    with mpl.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(paths[1], dpi=300, metadata={"Software": None})
    return paths


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    across = min(count, PANELS_A_ROW) or 1
    down = -(-count // across) or 1
    width = COLUMN_WIDTH if across == 1 else TEXT_WIDTH
    height = 2.45 if across < PANELS_A_ROW else 2.15
    with mpl.rc_context(STYLE):
        # not pyplot: it would keep every figure of a long run alive, and pick a window system
        figure = Figure(figsize=(width, height * down + 0.25), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _ratio_axis(axes: Axes, ratios: np.ndarray) -> None:
    """Log2 axis ticked at powers of two that the data span."""
    top = max(2.0, float(ratios.max()) if ratios.size else 2.0)
    powers = [2.0**power for power in range(int(np.floor(np.log2(top) + 1e-9)) + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.93, top * 1.08)
    axes.xaxis.set_major_locator(FixedLocator(powers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def _percent_axis(axes: Axes, top: float) -> None:
    """From 0 to the smallest round number above the data: a task near its floor would be a flat line on 0 to 100."""
    limit, step = next(
        (pair for pair in ((10, 2), (20, 5), (30, 10), (40, 10), (60, 20), (80, 20)) if top <= pair[0]), (100, 25)
    )
    axes.set_ylim(-0.03 * limit, 1.03 * limit)
    axes.set_yticks(range(0, limit + 1, step))


def _label_outer(panels: Sequence[Axes], x: str, y: str) -> None:
    for index, axes in enumerate(panels):
        if index % PANELS_A_ROW == 0:
            axes.set_ylabel(y)
    figure = panels[0].figure
    if len(panels) == 1:
        panels[0].set_xlabel(x)
    else:
        figure.supxlabel(x, fontsize=STYLE["axes.labelsize"])  # type: ignore[union-attr]


def _legend(figure: Figure, panels: Sequence[Axes], floor: bool = False, gold: bool = False) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    if floor:
        handles.append(mpl.lines.Line2D([], [], color="0.4", linewidth=1.0, linestyle=(0, (1, 3))))
        labels.append("without the context")
    if gold:
        handles.append(mpl.lines.Line2D([], [], color="0.4", linewidth=0.8, linestyle=_GOLD))
        labels.append("gold documents alone")
    room = 56 if len(panels) == 1 else 100  # characters a legend row holds at this size
    widths = [8 + len(label) for label in labels]  # a line and the space between entries count as 8
    fitting = (n for n in range(len(labels), 1, -1) if n * max(widths, default=0) <= room)  # columns are equally wide
    across = len(labels) if sum(widths) <= room else next(fitting, 1)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=across, frameon=False, columnspacing=1.2, handlelength=2.2
    )
