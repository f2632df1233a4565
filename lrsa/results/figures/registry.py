"""Figures by name: what a table and its records can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from matplotlib.figure import Figure

from lrsa.results.figures.curves import loss_figure, throughput_figure
from lrsa.results.figures.frames import held_frame, kept_frame, styles_of, table_frame
from lrsa.results.figures.heat import heat_figure, needle_figure
from lrsa.results.figures.lines import accuracy_figure, pareto_figure, position_figure, retention_figure
from lrsa.results.figures.retained import retained_figure
from lrsa.results.grids import (
    COMPRESSION,
    LAG,
    Grids,
    MixedRuns,
    NothingToShow,
    asks_for_depth,
    grid_of_needles,
    grid_of_settings,
)
from lrsa.results.positions import position_frame
from lrsa.results.record import Record, RecordError
from lrsa.results.retention import build_retention
from lrsa.results.statistics import RESAMPLES
from lrsa.results.tables import METRICS, ResultTable, Row

FigureOf = Callable[..., Figure]  # (records, table, **its own options); raises NothingToShow where it has no data


def _accuracy(records: Sequence[Record], table: ResultTable) -> Figure:
    cells = table_frame(table)
    if cells.empty or not table.metric.higher_is_better:
        raise NothingToShow(f"the table's metric is {table.metric.name}: the figure shows scores of answers")
    return accuracy_figure(cells, table.metric.title, styles_of(table))


def _pareto(records: Sequence[Record], table: ResultTable) -> Figure:
    held = held_frame(records, table.names)
    cells = table_frame(table).merge(held, on=["task", "arm", "column"])
    cells = cells[cells["compression"].notna()]
    if cells["column"].nunique() < 2:
        raise NothingToShow(
            "fewer than two compressions say how many bytes they hold (kv_bytes_per_layer, cache_bytes)"
        )
    return pareto_figure(cells, table.metric.title, styles_of(table), table.metric.higher_is_better)


def _retention(records: Sequence[Record], table: ResultTable, *, of: str = "own", bootstrap: int = RESAMPLES) -> Figure:
    factors = [c.setting.compression for c in table.columns if c.setting.compression not in (None, 1)]
    shares, note = _shares(records, table, of, bootstrap, factors)
    return retention_figure(table_frame(shares), shares.metric.title, styles_of(table), note)


def _retained(
    records: Sequence[Record], table: ResultTable, *, of: str = "reference", bootstrap: int = RESAMPLES
) -> Figure:
    factors = [c.setting.compression for c in table.columns if c.setting.compression is not None]
    shares, note = _shares(records, table, of, bootstrap, factors)
    cells = table_frame(shares).merge(kept_frame(records, table.names), on=["task", "arm", "column"])
    if cells.empty:
        raise NothingToShow("no run says the bytes of its full cache and of a compressed one (kv_bytes_per_layer)")
    whose = "the same model" if of == "own" else table.name(table.reference or "its reference")
    note = f"Retention: (score - floor) / ({whose}'s full - floor), each with its own floor, without the context.{note}"
    return retained_figure(cells, shares.metric.title, styles_of(table), note)


def _shares(
    records: Sequence[Record], table: ResultTable, of: str, bootstrap: int, factors: Sequence[float | None]
) -> tuple[ResultTable, str]:
    """Retention of the table's arms and tasks at `factors`, and what a caption must say of it."""
    metric = table.metric.name
    if metric not in METRICS:
        raise NothingToShow(f"the table's metric is {metric}: retention is of {', '.join(METRICS)}")
    try:
        shares = build_retention(
            records,
            of=of,
            arms=list(dict.fromkeys(row.arm for row in table.rows)),
            tasks=list(dict.fromkeys(row.task for row in table.rows)),
            compressions=[factor for factor in factors if factor is not None],
            reference=table.reference or {row.arm: row.reference for row in table.differences if row.reference},
            names=table.names,
            metric=metric,
            n_resamples=bootstrap,
        )
    except RecordError as error:
        raise NothingToShow(str(error)) from error
    if not any(cell.interval for row in shares.rows for cell in row.cells):
        raise NothingToShow("full - floor is nowhere clear of 0, so there is nothing to retain a share of")
    unclear = [row for row in shares.rows if any(cell.unclear for cell in row.cells)]
    absent = dict.fromkeys(row.arm for row in shares.rows if all(cell.weight is None for cell in row.cells))
    note = f" Full - floor not clear of 0: {_listed(shares, unclear)}." if unclear else ""
    note += f" Without a floor or full score: {', '.join(map(shares.name, absent))}." if absent else ""
    return shares, note


def _listed(table: ResultTable, rows: Sequence[Row]) -> str:
    """`Needles (A, B), XQuAD (A)`."""
    tasks = {row.task: [table.name(other.arm) for other in rows if other.task == row.task] for row in rows}
    return ", ".join(f"{table.name(task)} ({', '.join(arms)})" for task, arms in tasks.items())


def _position(records: Sequence[Record], table: ResultTable) -> Figure:
    stretches = position_frame(table)
    if stretches.empty or table.metric.name != "nll":
        raise NothingToShow("no prose was read by position: lrsa-eval mode=perplexity does, and metric=nll shows it")
    return position_figure(stretches)


def _loss(records: Sequence[Record], table: ResultTable) -> Figure:
    runs = _of_table(records, table)
    return loss_figure(runs, table.names, styles_of(table, runs))


def _throughput(records: Sequence[Record], table: ResultTable) -> Figure:
    runs = _of_table(records, table)
    return throughput_figure(runs, table.names, styles_of(table, runs))


def _heat(
    records: Sequence[Record],
    table: ResultTable,
    *,
    rows: str = LAG,
    columns: str = COMPRESSION,
    panels: str | None = None,
) -> Figure:
    def grids(panels: str | None) -> Grids:
        return grid_of_settings(runs, rows, columns, panels=panels, metric=_scored(table), names=table.names)

    runs = _of_table(records, table)
    try:
        return heat_figure(grids(panels))
    except MixedRuns as error:  # a sweep over two knobs: the other one's values side by side
        if panels or len(error.keys) != 1:
            raise
        return heat_figure(grids(error.keys[0]))


def _needle(
    records: Sequence[Record],
    table: ResultTable,
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    compressions: Sequence[float] = (),
) -> Figure:
    grids = grid_of_needles(
        _of_table(records, table),
        tasks=tasks,
        arms=arms,
        compressions=compressions,
        metric=_scored(table),
        names=table.names,
    )
    return needle_figure(grids)


def _scored(table: ResultTable) -> str:
    """The table's metric, if it is one of outcomes."""
    if table.metric.name not in METRICS:
        raise NothingToShow(f"the table's metric is {table.metric.name}, which single answers do not have")
    return table.metric.name


FIGURES: dict[str, FigureOf] = {
    "accuracy": _accuracy,
    "pareto": _pareto,
    "retention": _retention,
    "retained": _retained,
    "heat": _heat,
    "needle": _needle,
    "position": _position,
    "loss": _loss,
    "throughput": _throughput,
}

# A by-product, which a reader might take for a measurement of speed; and what retention shows already.
ON_REQUEST = ("throughput", "retained")


def make_figures(
    records: Sequence[Record],
    table: ResultTable,
    wanted: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Figure]:
    """The figures that are `wanted`, by name, with their options where it is a mapping; None: all that the records have
    the data for, but for those `ON_REQUEST`, and the needles only where depths or several lengths were asked for.

    Raises ValueError for an unknown name, and for a wanted figure without data, saying what it lacks (NothingToShow).
    """
    unknown = [name for name in wanted or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"unknown figure {', '.join(map(repr, unknown))}; choose from {', '.join(FIGURES)}")
    default = [name for name in FIGURES if name not in ON_REQUEST and (name != "needle" or asks_for_depth(records))]
    options = wanted if isinstance(wanted, Mapping) else {name: {} for name in (default if wanted is None else wanted)}
    made = {}
    for name, given in options.items():
        has = list(signature(FIGURES[name]).parameters)[2:]
        if strange := [key for key in given or {} if key not in has]:
            raise ValueError(f"figure {name} has no option {', '.join(strange)}; it has {', '.join(has) or 'none'}")
        try:
            made[name] = FIGURES[name](records, table, **(given or {}))
        except NothingToShow as error:
            if wanted is not None:
                raise NothingToShow(f"figure {name}: {error}") from error
    return made


def _of_table(records: Sequence[Record], table: ResultTable) -> list[Record]:
    """The records of the table's arms, arm by arm in its order; all of them where its rows are no arms."""
    arms = dict.fromkeys(row.arm for row in table.rows)
    return [record for arm in arms for record in records if record.arm == arm] or list(records)
