"""Heat maps: a score by two settings of the runs, and by depth and length of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lrsa.results.diffs import differences, flat, short_names, shown
from lrsa.results.figures.style import COLUMN_WIDTH, HEAT, STYLE, TEXT_WIDTH, NothingToShow, add_caption
from lrsa.results.record import Record
from lrsa.results.statistics import mean_over_seeds
from lrsa.results.store import Setting
from lrsa.results.tables import METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPRESSION = "compression"  # a cell's, where other settings are keys of the run's config
DEPTH_BINS = 10
"""Where no config says at which depths answers stand, this many equal stretches of the context."""
LAG = "evaluation.attention.lag_size"
LENGTH = "evaluation.length"


def heat_figure(
    records: Sequence[Record],
    rows: str = LAG,
    columns: str = COMPRESSION,
    *,
    panels: str | None = None,
    metric: str = "exact",
    names: Mapping[str, str] | None = None,
    n_resamples: int = 2000,
) -> Figure:
    """A score by two settings, a panel a task (and value of `panels`); each field says mean and 95% interval.

    Args:
        rows, columns, panels: dotted keys of the runs' configs, or `compression`, the cells' own.
        metric: one of `METRICS`.

    Raises:
        NothingToShow: a setting that does not vary, or is in no config.
        ValueError: an unknown metric; runs in one field that differ in more than their seed: name that key as `panels`,
            or leave some runs out.
    """
    scored, values = _metric(metric), dict.fromkeys((rows, columns, *([panels] if panels else [])))
    fields: dict[tuple[str, ...], list[tuple[Record, dict[str, float]]]] = {}
    for record in records:
        leaves = {key: shown(value) for key, value in flat(record.config).items()}
        for (task, setting), examples in _cells(record, metric).items():
            leaves[COMPRESSION] = setting.label
            if setting.compression is None or setting.context != "full" or any(key not in leaves for key in values):
                continue
            place = tuple(leaves[key] for key in values)
            fields.setdefault((task, *place), []).append((record, examples))
    for at, key in ((1, rows), (2, columns)):
        found = {field[at] for field in fields}
        if len(found) < 2:
            have = f"is {', '.join(found)} in all runs" if found else "is in no run's config"
            raise NothingToShow(f"{key} {have}: a heat map of {rows} x {columns} needs at least two values of each")
    for field, runs in fields.items():
        _check_alike(field, [record for record, _ in runs], values, panels)
    intervals = {
        field: mean_over_seeds([examples for _, examples in runs], n_resamples) for field, runs in fields.items()
    }
    groups = list(dict.fromkeys((field[0], *field[3:]) for field in fields))
    down, across = (_in_order({field[at] for field in fields}) for at in (1, 2))
    short = short_names(list(values))
    figure, grid = _grid(1, len(groups), len(across) * 0.46 + 0.55, len(down) * 0.3 + 0.5)
    top = max(interval.mean for interval in intervals.values()) * scored.scale
    scale = (0.0, 100.0) if scored.scale == 100 else (0.0, top)
    with mpl.rc_context(STYLE):
        for group, axes in zip(groups, grid[0], strict=True):
            means = np.full((len(down), len(across)), np.nan)
            for i, row in enumerate(down):
                for j, column in enumerate(across):
                    interval = intervals.get((group[0], row, column, *group[1:]))
                    if interval is None:
                        continue
                    means[i, j] = interval.mean * scored.scale
                    low, high = (
                        interval.number(end, scored.scale, scored.digits) for end in (interval.low, interval.high)
                    )
                    shade = (means[i, j] - scale[0]) / (scale[1] - scale[0] or 1)
                    ink = "black" if shade > 0.55 else "white"
                    text = interval.number(interval.mean, scored.scale, scored.digits)
                    axes.text(j, i - 0.12, text, ha="center", va="center", color=ink, fontsize=6.5)
                    axes.text(j, i + 0.27, f"{low} to {high}", ha="center", va="center", color=ink, fontsize=3.9)
            image = _draw(axes, means, scale)
            axes.set_xticks(range(len(across)), [text.replace("x", "×") for text in across])
            axes.set_yticks(range(len(down)), down)
            title = " · ".join(
                [(names or {}).get(group[0], group[0]), *(f"{short[panels]} {v}" for v in group[1:] if panels)]
            )
            axes.set_title(title, loc="left", fontweight="bold")
        grid[0][0].set_ylabel(short[rows].replace("_", " "))
        for axes in grid[0]:
            axes.set_xlabel("nominal KV compression" if columns == COMPRESSION else short[columns].replace("_", " "))
        _colour_bar(figure, image, list(grid[0]), scored.title)
        sizes = sorted({interval.size for interval in intervals.values()})
        add_caption(figure, f"Mean, and 95% interval over examples and seeds; n a field: {', '.join(sizes)}.")
    return figure


def needle_figure(
    records: Sequence[Record],
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    compressions: Sequence[float] = (),
    metric: str = "exact",
    names: Mapping[str, str] | None = None,
) -> Figure:
    """The needle in a haystack: a score by the length of the context and the depth at which the answer stands in it, a
    row of panels a task and arm, a panel a compression. Seeds are pooled.

    Depths are those of the task's `args.depths`, else `DEPTH_BINS` stretches; an answer counts at the nearest one.

    Raises:
        NothingToShow: no outcome of the tasks, arms and compressions says its `depth`.
        ValueError: an unknown metric.
    """
    scored = _metric(metric)
    found = pd.DataFrame(
        [
            {
                "task": row["task"],
                "arm": record.arm,
                "order": Setting.of(row).order,
                "column": Setting.of(row).label,
                "length": int(_length(record)),
                "depth": _nearest(float(row["depth"]), _depths(record, row["task"])),
                "value": float(row[metric]) * scored.scale,
            }
            for record in records
            if (not arms or record.arm in arms) and _length(record)
            for row in record.outcomes()
            if row.get("depth") is not None and Setting.of(row).context == "full" and row.get(metric) is not None
            if (not tasks or row["task"] in tasks) and (not compressions or row["compression"] in compressions)
        ]
    )
    if found.empty:
        raise NothingToShow(
            f"no outcome with {metric} says its depth: tasks with one needle do (task=[passkey64]), in records from "
            "when depths were recorded"
        )
    columns = list(found.sort_values("order")["column"].drop_duplicates())
    rows = list(found[["task", "arm"]].drop_duplicates().itertuples(index=False, name=None))
    lengths, depths = sorted(set(found["length"])), sorted(set(found["depth"]))
    width = max(0.62, 0.24 * len(lengths))
    figure, grid = _grid(len(rows), len(columns), width + 0.3, 0.095 * len(depths) + 0.5)
    scale = (0.0, 100.0) if scored.scale == 100 else (0.0, float(found["value"].max()))
    named, several = names or {}, found["task"].nunique() > 1
    with mpl.rc_context(STYLE):
        for i, (task, arm) in enumerate(rows):
            for j, column in enumerate(columns):
                axes = grid[i][j]
                here = found[(found["task"] == task) & (found["arm"] == arm) & (found["column"] == column)]
                means = here.pivot_table(index="depth", columns="length", values="value", aggfunc="mean")
                image = _draw(axes, means.reindex(index=depths, columns=lengths).to_numpy(dtype=float), scale)
                axes.set_xticks(range(len(lengths)), [_length_text(length) for length in lengths])
                every = max(1, (len(depths) - 1) // 5)
                shown_depths = list(range(0, len(depths), every))
                axes.set_yticks(shown_depths, [f"{100 * depths[k]:.0f}" for k in shown_depths] if j == 0 else [])
                axes.tick_params(axis="x", labelrotation=90 if len(lengths) > 4 else 0, labelsize=6)
                if i < len(rows) - 1:
                    axes.set_xticklabels([])
                if i == 0:
                    axes.set_title("full cache" if column == "full" else column.replace("x", "×"), fontsize=7.5)
            label = named.get(arm, arm) if not several else f"{named.get(task, task)}\n{named.get(arm, arm)}"
            grid[i][0].set_ylabel(f"{label}\ndepth, %", fontsize=7)
        for axes in grid[-1]:
            axes.set_xlabel("context, tokens", fontsize=7)
        _colour_bar(figure, image, [axes for row in grid for axes in row], scored.title)
        count = found.groupby(["task", "arm", "column", "length", "depth"]).size()
        n = f"{count.min()}" if count.min() == count.max() else f"{count.min()} to {count.max()}"
        seeds = len({record.seed for record in records})
        pooled = f" over {seeds} seeds" if seeds > 1 else ""
        add_caption(
            figure, f"Depth: where the answer starts, 0 at the beginning. Means of n = {n} answers a field{pooled}."
        )
    return figure


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"unknown metric '{name}'; choose from {', '.join(METRICS)}")
    return METRICS[name]


def _cells(record: Record, metric: str) -> dict[tuple[str, Setting], dict[str, float]]:
    """Values by example of each cell that a finished record measured in `metric`."""
    found: dict[tuple[str, Setting], dict[str, float]] = {}
    for row in record.outcomes():
        if row.get(metric) is not None and "positions" not in row:
            found.setdefault((row["task"], Setting.of(row)), {})[row["id"]] = float(row[metric])
    return found


def _check_alike(field: tuple[str, ...], runs: Sequence[Record], values: Mapping[str, Any], panels: str | None) -> None:
    seeds = [record.seed for record in runs]
    if len(set(seeds)) == len(seeds):
        return
    others = [key for key in differences(runs) if key not in values and not key.startswith("run.")]
    what = ", ".join(others[:4]) or "nothing (the same run twice)"
    where = f"{field[0]} at {', '.join(f'{key}={value}' for key, value in zip(values, field[1:], strict=True))}"
    how = "leave all but one out" if panels or not others else f"name it as panels={others[0]}, or leave some out"
    raise ValueError(f"{where}: {len(runs)} runs with seeds {', '.join(map(str, seeds))} differ in {what}; {how}")


def _length(record: Record) -> Any:
    return flat(record.config).get(LENGTH)


def _depths(record: Record, task: str) -> list[float]:
    tasks = (record.config.get("evaluation") or {}).get("tasks") or {}
    asked = ((tasks.get(task) or {}).get("args") or {}).get("depths")
    return [float(depth) for depth in asked] if asked else [(i + 0.5) / DEPTH_BINS for i in range(DEPTH_BINS)]


def _nearest(depth: float, depths: Sequence[float]) -> float:
    return min(depths, key=lambda one: abs(one - depth))


def _length_text(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _in_order(values: set[str]) -> list[str]:
    """Numbers by size, `full` before `2x`, texts by name."""

    def key(value: str) -> tuple[int, float, str]:
        try:
            return 0, 1.0 if value == "full" else float(value.removesuffix("x")), value
        except ValueError:
            return 1, 0.0, value

    return sorted(values, key=key)


def _grid(down: int, across: int, width: float, height: float) -> tuple[Figure, Any]:
    """`down` x `across` panels of a size in inches, on a column where they fit, else on the text's width."""
    wanted = across * width + 0.9
    total = COLUMN_WIDTH if wanted <= COLUMN_WIDTH else TEXT_WIDTH
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
