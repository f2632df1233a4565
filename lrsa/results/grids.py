"""Scores over two axes: by two settings of the runs, and by depth and length of the context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lrsa.results.diffs import differences, short_names, shown
from lrsa.results.keys import flat
from lrsa.results.record import Record
from lrsa.results.statistics import Interval, mean_over_seeds
from lrsa.results.store import Setting
from lrsa.results.tables import METRICS, Metric

COMPRESSION = "compression"  # a cell's, where other settings are keys of the run's config
LAG, LENGTH = "evaluation.attention.lag_size", "evaluation.length"
DEPTH_BINS = 10  # equal stretches of the context, where no config says at which depths answers stand


class NothingToShow(ValueError):
    """There is no data for what is asked; the message says which, and how to get it."""


class MixedRuns(NothingToShow):
    """Runs that differ in more than their seed fall into one field; `keys`: in what."""

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


@dataclass(frozen=True)
class Grid:
    """One panel: `means [rows, columns]` in the metric's printed unit, NaN where nothing was measured; `intervals` as
    far as they are known; `title` its labels, outer first.
    """

    title: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    means: np.ndarray
    intervals: Mapping[tuple[int, int], Interval]
    counts: np.ndarray  # examples behind each mean, over all seeds


@dataclass(frozen=True)
class Grids:
    """Panels that share their axes, and what these are."""

    metric: Metric
    row_label: str
    column_label: str
    panels: tuple[Grid, ...]

    @property
    def scale(self) -> tuple[float, float]:
        """Ends of the colours: 0 to 100 for percents, else up to the largest mean."""
        top = max(float(np.nanmax(panel.means)) for panel in self.panels)
        return (0.0, 100.0) if self.metric.scale == 100 else (0.0, top)


def grid_of_settings(
    records: Sequence[Record],
    rows: str = LAG,
    columns: str = COMPRESSION,
    *,
    panels: str | None = None,
    metric: str = "exact",
    names: Mapping[str, str] | None = None,
    n_resamples: int = 2000,
) -> Grids:
    """A score by two settings, a panel a task (and value of `panels`).

    Args:
        rows, columns, panels: dotted keys of the runs' configs, or `compression`, the cells' own.
        metric: one of `METRICS`.

    Raises:
        NothingToShow: a setting that does not vary, or is in no config.
        MixedRuns: runs in one field that differ in more than their seed: name that key as `panels`, or leave some out.
        ValueError: an unknown metric.
    """
    scored, keys = known_metric(metric), list(dict.fromkeys((rows, columns, *([panels] if panels else []))))
    settings = [{key: shown(value) for key, value in flat(record.config).items()} for record in records]
    for key in (rows, columns):
        found = {leaves[key] for leaves in settings if key in leaves}
        if key != COMPRESSION and len(found) < 2:
            have = f"is {', '.join(found)} in all runs" if found else "is in no run's config"
            raise NothingToShow(f"{key} {have}: {rows} x {columns} needs at least two values of each")
    fields: dict[tuple[str, ...], list[tuple[Record, dict[str, float]]]] = {}
    for record, leaves in zip(records, settings, strict=True):
        for (task, setting), examples in _cells(record, metric):
            here = leaves | {COMPRESSION: setting.label}
            if setting.compression is not None and setting.context == "full" and all(key in here for key in keys):
                fields.setdefault((task, *(here[key] for key in keys)), []).append((record, examples))
    for field, runs in fields.items():
        _check_alike(field, [record for record, _ in runs], keys, panels)
    down, across = (_in_order({field[at] for field in fields}) for at in (1, 2))
    if len(down) < 2 or len(across) < 2:
        raise NothingToShow(f"{rows} x {columns}: {len(down)} x {len(across)} fields were measured in {metric}")
    short = short_names(keys)
    made = []
    for group in dict.fromkeys((field[0], *field[3:]) for field in fields):
        means, counts = np.full((2, len(down), len(across)), np.nan)
        intervals = {}
        for field, runs in fields.items():
            if (field[0], *field[3:]) != group:
                continue
            at = down.index(field[1]), across.index(field[2])
            intervals[at] = mean_over_seeds([examples for _, examples in runs], n_resamples)
            means[at], counts[at] = intervals[at].mean * scored.scale, intervals[at].n * intervals[at].seeds
        title = ((names or {}).get(group[0], group[0]), *(f"{short[panels]} {value}" for value in group[1:] if panels))
        made.append(Grid(title, tuple(down), tuple(across), means, intervals, counts))
    labels = [
        "nominal KV compression" if key == COMPRESSION else short[key].replace("_", " ") for key in (rows, columns)
    ]
    return Grids(scored, labels[0], labels[1], tuple(made))


def grid_of_needles(
    records: Sequence[Record],
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    compressions: Sequence[float] = (),
    metric: str = "exact",
    names: Mapping[str, str] | None = None,
) -> Grids:
    """The needle in a haystack: a score by the depth at which the answer stands and the length of the context, a panel
    a task, arm and compression. Seeds are pooled.

    Depths are those of the task's `args.depths`, else the middles of `DEPTH_BINS` stretches; an answer counts at the
    nearest one.

    Raises:
        NothingToShow: no outcome of the tasks, arms and compressions says its `depth`.
        ValueError: an unknown metric.
    """
    scored, named = known_metric(metric), names or {}
    found = pd.DataFrame(
        [
            {
                "panel": (named.get(row["task"], row["task"]), named.get(record.arm, record.arm), setting.label),
                "order": setting.order,
                "length": int(flat(record.config)[LENGTH]),
                "depth": _nearest(float(row["depth"]), _depths(record, row["task"])),
                "value": float(row[metric]) * scored.scale,
            }
            for record in records
            if (not arms or record.arm in arms) and flat(record.config).get(LENGTH)
            for row in record.outcomes()
            if row.get("depth") is not None and row.get(metric) is not None
            if (not tasks or row["task"] in tasks) and (not compressions or row["compression"] in compressions)
            if (setting := Setting.of(row)).context == "full"
        ]
    )
    if found.empty:
        raise NothingToShow(
            f"no outcome with {metric} says its depth: tasks with one needle do (task=[passkey64]), in records from "
            "when depths were recorded"
        )
    lengths, depths = sorted(set(found["length"])), sorted(set(found["depth"]))
    made = []
    for panel, cells in found.sort_values("order", kind="stable").groupby("panel", sort=False):
        by_field = cells.pivot_table(index="depth", columns="length", values="value", aggfunc=["mean", "count"])
        means, counts = (
            by_field[name].reindex(index=depths, columns=lengths).to_numpy(dtype=float) for name in ("mean", "count")
        )
        rows, columns = tuple(f"{100 * depth:.0f}" for depth in depths), tuple(map(_length_text, lengths))
        made.append(Grid(tuple(panel), rows, columns, means, {}, counts))
    return Grids(scored, "depth, %", "context, tokens", tuple(made))


def asks_for_depth(records: Sequence[Record]) -> bool:
    """Whether runs were made to be seen by depth: at several lengths, or at depths that the config names."""
    leaves = [flat(record.config) for record in records]
    lengths = {leaf[LENGTH] for leaf in leaves if LENGTH in leaf}
    return len(lengths) > 1 or any(key.endswith("args.depths") and leaf[key] for leaf in leaves for key in leaf)


def known_metric(name: str) -> Metric:
    """That of `METRICS`. Raises ValueError for an unknown name."""
    if name not in METRICS:
        raise ValueError(f"unknown metric '{name}'; choose from {', '.join(METRICS)}")
    return METRICS[name]


def _cells(record: Record, metric: str) -> Iterator[tuple[tuple[str, Setting], dict[str, float]]]:
    """Values by example of each cell that a finished record measured in `metric`."""
    found: dict[tuple[str, Setting], dict[str, float]] = {}
    for row in record.outcomes():
        if row.get(metric) is not None and "positions" not in row:
            found.setdefault((row["task"], Setting.of(row)), {})[row["id"]] = float(row[metric])
    yield from found.items()


def _check_alike(field: tuple[str, ...], runs: Sequence[Record], keys: Sequence[str], panels: str | None) -> None:
    seeds = [record.seed for record in runs]
    if len(set(seeds)) == len(seeds):
        return
    others = [key for key in differences(runs) if key not in keys and not key.startswith("run.")]
    what = ", ".join(others[:4]) or "nothing (the same run twice)"
    where = f"{field[0]} at {', '.join(f'{key}={value}' for key, value in zip(keys, field[1:], strict=True))}"
    how = "leave all but one out" if panels or not others else f"name it as panels={others[0]}, or leave some out"
    seen = ", ".join(map(str, seeds))
    raise MixedRuns(f"{where}: {len(runs)} runs with seeds {seen} differ in {what}; {how}", others)


def _depths(record: Record, task: str) -> list[float]:
    tasks: Any = (record.config.get("evaluation") or {}).get("tasks") or {}
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
