"""The charts that a table and its records have the data for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lrsa.results.diffs import knobs, told_apart
from lrsa.results.figures.curves import running_mean
from lrsa.results.figures.frames import held_frame, sizes, styles_of, table_frame
from lrsa.results.figures.lines import bytes_text, frontier
from lrsa.results.figures.style import ArmStyle
from lrsa.results.grids import (
    COMPRESSION,
    LAG,
    LENGTH,
    NothingToShow,
    asks_for_depth,
    grid_of_needles,
    grid_of_settings,
)
from lrsa.results.positions import position_frame
from lrsa.results.record import Record
from lrsa.results.report.charts import Axis, Chart, Curve, Rule, Value, draw_grids, draw_panel, linear_axis, power_axis
from lrsa.results.tables import ResultTable

MOST_TIPS = 60  # of a loss curve: hundreds of runs must still make a page
MEASURED = "KV compression, measured (full / kept)"


def charts_of(
    records: Sequence[Record], table: ResultTable, retention: ResultTable | None, families: Mapping[str, str]
) -> list[Chart]:
    """In the order of a reader's questions: how good, at what cost, what is lost, where. `families`: of an arm that was
    renamed, the arm that its records name.
    """
    made: list[Chart] = []
    views: list[Callable[[], Chart]] = [
        lambda: accuracy(table),
        lambda: pareto(records, table),
        lambda: retained(retention, styles_of(table)),
        lambda: settings(records, table, families),
        lambda: needles(records, table, families),
        lambda: positions(table),
    ]
    for view in views:
        try:
            made.append(view())
        except NothingToShow:
            continue
    return made


def accuracy(table: ResultTable) -> Chart:
    """The table's scores by measured compression; dotted: without the context."""
    cells, styles, metric = table_frame(table), styles_of(table), table.metric
    measured = cells[cells["measured_ratio"].notna() & cells["compression"].notna()]
    if measured.empty:
        raise NothingToShow("no cell says its measured ratio")
    panels = []
    for task, of_task in measured.groupby("task", sort=False):
        curves = [
            Curve(
                str(arm),
                styles[str(arm)],
                _values(line, "measured_ratio", metric.digits),
                "" if styles[str(arm)].dashed else "band",
            )
            for arm, line in of_task.groupby("arm", sort=False)
        ]
        floors = cells[(cells["task"] == task) & cells["compression"].isna()]
        rules = [Rule(row.mean, str(row.arm), styles[row.arm]) for row in floors.itertuples()]
        y = _score_axis([*of_task["low"], *of_task["high"], *floors["mean"]])
        x = power_axis([1.0, *of_task["measured_ratio"]], 2, lambda value: f"{value:g}×")
        panels.append(draw_panel(str(task), curves, x, y, rules=rules))
    floor = " Dotted: without the context." if cells["compression"].isna().any() else ""
    caption = f"Bands: 95% intervals. {sizes(cells)}.{floor}"
    title = _capital(metric.title.split(",")[0]) + " by measured compression"
    return Chart("accuracy", title, MEASURED, metric.title, caption, panels)


def pareto(records: Sequence[Record], table: ResultTable) -> Chart:
    """The same by kept bytes, with the frontier."""
    cells = table_frame(table).merge(held_frame(records, table.names), on=["task", "arm", "column"])
    cells, styles, metric = cells[cells["compression"].notna()], styles_of(table), table.metric
    if cells["column"].nunique() < 2:
        raise NothingToShow("fewer than two compressions say how many bytes they hold")
    panels = []
    for task, of_task in cells.groupby("task", sort=False):
        curves = [
            Curve(str(arm), styles[str(arm)], _values(line, "bytes_per_token", metric.digits), "bars")
            for arm, line in of_task.groupby("arm", sort=False)
        ]
        best = frontier(of_task, metric.higher_is_better)
        panels.append(
            draw_panel(
                str(task),
                curves,
                power_axis(list(of_task["bytes_per_token"]), 2, bytes_text),
                _score_axis([*of_task["low"], *of_task["high"]]),
                stairs=list(zip(best["bytes_per_token"], best["mean"], strict=True)),
            )
        )
    caption = f"Grey: the frontier of the means. Bars: 95% intervals. {sizes(cells)}."
    title = f"{_capital(metric.title.split(',')[0])} by kept bytes"
    return Chart("pareto", title, "KV cache held, a token of the prompt, all layers", metric.title, caption, panels)


def retained(table: ResultTable | None, styles: Mapping[str, ArmStyle]) -> Chart:
    """Retention by measured compression."""
    cells = pd.DataFrame() if table is None else table_frame(table)
    if table is None or cells.empty:
        raise NothingToShow("no retention")
    panels = []
    for task, of_task in cells.groupby("task", sort=False):
        low, high = max(-60.0, min(0.0, of_task["low"].min())), min(160.0, max(100.0, of_task["high"].max()))
        curves = [
            Curve(str(arm), styles[str(arm)], _values(line, "measured_ratio", 1), "bars")
            for arm, line in of_task.groupby("arm", sort=False)
        ]
        x = power_axis([1.0, *of_task["measured_ratio"]], 2, lambda value: f"{value:g}×")
        panels.append(draw_panel(str(task), curves, x, linear_axis(low, high), rules=[Rule(0.0), Rule(100.0)]))
    caption = "100: what the full cache gains over no context is all there; 0: none of it. Bars: 95% intervals."
    return Chart("retention", "What is retained", MEASURED, table.metric.title, caption, panels)


def settings(records: Sequence[Record], table: ResultTable, families: Mapping[str, str]) -> Chart:
    """By the one or two knobs of an arm that was swept and the compression; else lag by compression."""
    shared: dict[str, Any] = {"metric": table.metric.name, "names": table.names}
    for family in dict.fromkeys(families.values()):
        members = [record for record in records if families.get(record.arm) == family]
        rows, *more = knobs(members) or [LAG]
        if len(more) > 1:
            continue
        grids = grid_of_settings(members, rows, *more, panels=COMPRESSION if more else None, **shared)
        title = f"{table.name(family)}: {grids.row_label} by {grids.column_label}"
        return draw_grids(grids, "heat", title, "Means over examples and seeds.")
    try:
        grids = grid_of_settings(records, **shared)
    except ValueError as error:  # runs that differ in more than lag and seed: an ablation of something else
        raise NothingToShow(str(error)) from error
    return draw_grids(grids, "heat", f"{_capital(grids.row_label)} by compression", "Means over examples and seeds.")


def needles(records: Sequence[Record], table: ResultTable, families: Mapping[str, str]) -> Chart:
    """Depth by length, which therefore tells no arms apart."""
    if not asks_for_depth(records):
        raise NothingToShow("one length, and answers at random depths")
    own = [replace(record, arm=families.get(record.arm, record.arm)) for record in records]
    grids = grid_of_needles(told_apart(own, but=(LENGTH,)), metric=table.metric.name, names=table.names)
    caption = "Depth: where the answer starts in the context, 0 at its beginning."
    return draw_grids(grids, "needle", "By depth and length of the context", caption)


def positions(table: ResultTable) -> Chart:
    """Prose by position."""
    stretches = position_frame(table)
    if stretches.empty:
        raise NothingToShow("no prose")
    columns = list(dict.fromkeys(stretches["column"]))
    stretches = stretches.assign(mean=stretches["nll"])
    panels = []
    for arm, of_arm in stretches.groupby("arm", sort=False):
        curves = [
            Curve(str(column), ArmStyle(columns.index(column)), _values(line, "middle", 3), "band")
            for column, line in of_arm.groupby("column", sort=False)
        ]
        x, y = linear_axis(0, of_arm["middle"].max()), linear_axis(of_arm["low"].min(), of_arm["high"].max())
        panels.append(draw_panel(str(arm), curves, x, y))
    over = "NLL above full cache" if stretches["difference"].any() else "NLL of prose"
    caption = "Bands: 95% intervals over windows and seeds."
    return Chart("position", f"{over} by position", "token of the window", f"{over}, nats a token", caption, panels)


def losses(records: Sequence[Record], names: Mapping[str, str], styles: Mapping[str, ArmStyle]) -> Chart:
    """Training loss, a line a run."""
    curves: list[Curve] = []
    steps, seen = [1.0], list[float]()
    order = list(styles)
    known = [record for record in records if names.get(record.arm, record.arm) in styles]
    for record in sorted(known, key=lambda record: (order.index(names.get(record.arm, record.arm)), record.seed)):
        curve = (record.training or {}).get("loss_curve") or {}
        pairs = [(s, v) for s, v in zip(curve.get("step", []), curve.get("loss", []), strict=True) if v is not None]
        arm = names.get(record.arm, record.arm)
        if not pairs:
            continue
        at, raw = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        smooth, every = running_mean(raw), -(-len(raw) // MOST_TIPS)
        steps, seen = [*steps, *at], [*seen, *raw[raw > 0]]
        plain = [Value(float(x), float(y), "") for x, y in zip(at, raw, strict=True)]
        means = [
            Value(float(x), float(y), "" if k % every else f"{arm}, seed {record.seed}, step {x:g}: {y:.3f} ({z:.3f})")
            for k, (x, y, z) in enumerate(zip(at, smooth, raw, strict=True))
        ]
        curves.append(Curve(arm, styles[arm], plain, marks=False, thin=True))
        curves.append(Curve(arm, styles[arm], means, marks=False))
    if not seen:
        raise NothingToShow("no record holds a loss curve")
    panel = draw_panel("", curves, linear_axis(0, max(steps)), power_axis(seen, 10, "{:g}".format))
    caption = "A line a run: running means over 5% of the steps; thin, and in brackets: as logged."
    return Chart("loss", "Training loss", "optimiser step", "loss, nats a token", caption, [panel])


def _values(line: pd.DataFrame, x: str, digits: int) -> list[Value]:
    """A curve's points, each saying its arm, setting, interval and n."""
    found = []
    for row in line.sort_values(x).to_dict("records"):
        seeds = row.get("seeds", 1)
        n = row["n"] if seeds == 1 else f"{row['n']} × {seeds} seeds"
        number = f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        ratio = row.get("measured_ratio")
        at = f"{row['column']} ({ratio:.2f}×)" if ratio and row["column"] != "full" else row["column"]
        where = f", token {row[x]:,.0f}" if x == "middle" else ""
        held = f", {bytes_text(row[x])} a token" if x == "bytes_per_token" else ""
        tip = f"{row['arm']}, {at}{where}{held}: {number}, n = {n}"
        found.append(Value(float(row[x]), float(row["mean"]), tip, float(row["low"]), float(row["high"])))
    return found


def _score_axis(values: Sequence[float]) -> Axis:
    return linear_axis(min(0.0, *values), max(1e-9, *values))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
