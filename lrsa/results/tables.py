"""The train x inference table: how every post-trained arm does at every compression, and whether arms differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from lrsa.results.join import BY_ARM, EVERYWHERE, FULL, Joined, collect_cells
from lrsa.results.keys import check_keys
from lrsa.results.notes import Seeds, notes_of
from lrsa.results.pivot import Pivot
from lrsa.results.pool import Pool
from lrsa.results.record import Record, RecordError
from lrsa.results.setting import Setting
from lrsa.results.statistics import RESAMPLES, Interval
from lrsa.results.where import Where

MISSING, UNCLEAR = "missing", "unclear"
DRAWS = EACH, SHARED = "each", "shared"  # of the bootstrap: an interval's own, or one for the whole table


@dataclass(frozen=True)
class Metric:
    """A number every example has, and how it is printed: `scale` times the value, with `digits` decimals."""

    name: str  # field of an outcome and of a cell
    title: str
    unit: str  # of a difference
    scale: float = 1.0
    digits: int = 2
    higher_is_better: bool = True


METRICS = {
    "exact": Metric("exact", "exact match, %", "points", scale=100.0, digits=1),
    "nll": Metric("nll", "answer NLL, nats a token", "nats", digits=3, higher_is_better=False),
    "exact_match": Metric("exact_match", "normalised exact match, %", "points", scale=100.0, digits=1),
    "f1": Metric("f1", "F1, %", "points", scale=100.0, digits=1),
    "rouge_l": Metric("rouge_l", "ROUGE-L, %", "points", scale=100.0, digits=1),
    "string_match": Metric("string_match", "string match, %", "points", scale=100.0, digits=1),
}

GENERATED = ("exact_match", "f1", "rouge_l", "string_match")  # of answers in words


@dataclass(frozen=True)
class Column:
    """An inference setting, with the `measured` ratios over its cells (full cache / kept)."""

    setting: Setting
    measured: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return self.setting.label

    @property
    def header(self) -> str:
        """`floor`, `gold`, `full`, `4x (3.37x)`, or `4x (3.30x to 3.37x)` where cells differ."""
        shown = sorted({f"{ratio:.2f}x" for ratio in self.measured}, key=lambda text: float(text[:-1]))
        if not shown or (self.label == "full" and shown == ["1.00x"]):
            return self.label
        return f"{self.label} ({shown[0]})" if len(shown) == 1 else f"{self.label} ({shown[0]} to {shown[-1]})"


@dataclass(frozen=True)
class Cell:
    """`interval` None: the cell was never measured, or is `unclear`: a share of this difference, which may be 0.
    `best`: better than every other arm, each paired interval clear of 0.
    """

    interval: Interval | None = None
    measured_ratio: float | None = None
    best: bool = False
    unclear: Interval | None = None

    @property
    def absent(self) -> str:
        """What stands in place of a number."""
        return MISSING if self.unclear is None else UNCLEAR

    @property
    def weight(self) -> Interval | None:
        """What says the n behind the cell, whether it holds a number or not."""
        return self.interval or self.unclear


@dataclass(frozen=True)
class Row:
    """``reference``: the arm that a row of differences is to; ``positions``: of prose, half-open."""

    task: str
    arm: str
    cells: tuple[Cell, ...]
    reference: str | None = None
    positions: tuple[int, int] | None = None

    @property
    def size(self) -> str | None:
        """`160` or `160 × 3 seeds` when all measured cells agree, else None: each cell then says its own."""
        sizes = {cell.weight.size for cell in self.cells if cell.weight is not None}
        return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True)
class ResultTable:
    """`rows` task by task, arms in order; `differences` the same cells as arm minus reference, paired by example.
    `reference` is that of all rows, None where each has its own.
    """

    title: str
    metric: Metric
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    differences: tuple[Row, ...] = ()
    reference: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rebuild: str = "lrsa-table"
    rows_title: str = "post-trained with"

    def name(self, key: str) -> str:
        return self.names.get(key, key)

    def row_name(self, row: Row) -> str:
        own = row.reference if self.reference is None else None
        return self.name(row.arm) if own is None else f"{self.name(row.arm)} − {self.name(own)}"

    @property
    def difference_title(self) -> str:
        of = "" if self.reference is None else f" to {self.name(self.reference)}"
        return f"difference{of}, {self.metric.unit}"


def build_table(
    records: Sequence[Record],
    *,
    title: str = "Post-training x inference compression",
    arms: Sequence[str] = (),
    tasks: Sequence[str] = (),
    compressions: Sequence[float] = (),
    reference: str | Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    metric: str = "exact",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    rebuild: str = "lrsa-table",
    seeds: Seeds = (),
    where: Where = EVERYWHERE,
    pivot: Pivot = BY_ARM,
    draws: str = EACH,
) -> ResultTable:
    """Join `records` into a table: seeds of an arm together, arms paired by example.

    `arms` and `tasks` give rows and their order (default: all, arms by name, tasks as evaluated); one that no record
    holds becomes `missing` cells. `compressions` choose the columns (default: all that were measured, floor and gold
    too).
    `reference` (default: the first arm) is what the differences are to, or for each arm that is to have one, its own;
    `full` is each arm's own full cache.
    `names` are display names. `seeds`, of all arms or of each: those that the table is to hold; a note and a warning
    name the ones that no record gives. `where` chooses cells; `pivot` makes rows and columns of other keys than arm and
    compression, and `arms` and `reference` then mean rows as they are called there. `draws`: `each` interval by its
    own, or one `shared` by all, for tables of hundreds of cells (`lrsa.results.pool`).

    Raises ValueError for an unknown metric or reference and for arms scored on different
    examples; RecordError where outcomes contradict the record's cells, two different experiments claim one cell, or
    nothing is left.
    """
    chosen = select(records, metric, arms, tasks, compressions, reference, n_resamples, seed, where, pivot, draws)
    joined, arms, tasks, references = chosen.joined, chosen.arms, chosen.tasks, chosen.references
    columns = columns_of(joined)
    rows, differences = [], []
    for task in tasks:
        best = {c: joined.best(arms, task, c.setting, METRICS[metric].higher_is_better) for c in columns}
        for arm in arms:
            keys = [(arm, task, column.setting) for column in columns]
            ratios = [joined.cells[key].ratio if key in joined.cells else None for key in keys]
            wins = [best[column] == arm for column in columns]
            window = next((joined.cells[key].positions for key in keys if key in joined.cells), None)
            rows.append(Row(task, arm, tuple(map(Cell, map(joined.mean, keys), ratios, wins)), positions=window))
            to = references.get(arm)
            if to is not None:
                gains = [joined.to_full(key) if to == FULL.label else joined.difference(key, to) for key in keys]
                differences.append(Row(task, arm, tuple(map(Cell, gains, ratios)), to, window))
    table = ResultTable(
        title=title,
        metric=metric_of(joined, metric),
        columns=columns,
        rows=tuple(rows),
        differences=tuple(differences),
        reference=chosen.reference,
        names=dict(names or {}),
        rebuild=rebuild,
        rows_title=pivot.title,
    )
    return replace(table, notes=notes_of(table, joined, seeds))


@dataclass(frozen=True)
class Selection:
    """What a table is of. `references`: of each arm that has one; `reference`: that of all, or None."""

    joined: Joined
    arms: Sequence[str]
    tasks: Sequence[str]
    references: Mapping[str, str]
    reference: str | None


def select(
    records: Sequence[Record],
    metric: str,
    arms: Sequence[str],
    tasks: Sequence[str],
    compressions: Sequence[float],
    reference: str | Mapping[str, str] | None,
    n_resamples: int,
    seed: int,
    where: Where = EVERYWHERE,
    pivot: Pivot = BY_ARM,
    draws: str = EACH,
) -> Selection:
    """The cells that `build_table` is asked for, with its arguments and its errors."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric '{metric}'; choose from {', '.join(METRICS)}")
    check_keys((*pivot.rows, *pivot.columns, *where.keys), records)
    if draws not in DRAWS:
        raise ValueError(f"unknown draws '{draws}'; choose from {', '.join(DRAWS)}")
    cells = collect_cells(records, metric, arms, tasks, compressions, where, pivot)
    pool = Pool(n_resamples, seed, (run for cell in cells.values() for run in cell.runs)) if draws == SHARED else None
    joined = Joined(cells, n_resamples, seed, pool)
    orders = {arm: cell.order for (arm, _, _), cell in joined.cells.items()}
    arms = list(arms) or sorted(orders, key=orders.__getitem__)
    tasks = list(tasks) or list(dict.fromkeys(task for _, task, _ in joined.cells))
    reference = reference if reference is not None else (arms[0] if len(arms) > 1 else None)
    if reference == FULL.label and reference not in arms:
        if not any(setting == FULL for _, _, setting in joined.cells):
            raise RecordError("reference=full: no record holds the full column; name an arm, or evaluate at 1 too")
        return Selection(joined, arms, tasks, dict.fromkeys(arms, reference), reference)
    if reference is None or isinstance(reference, str):
        references = {arm: reference for arm in arms if reference not in (None, arm)}
    else:
        references, reference = dict(reference), None
    for name in [*references, *references.values(), reference]:
        if name is not None and name not in arms:
            raise ValueError(f"reference arm '{name}' is not among the table's arms: {', '.join(arms)}")
    if not joined.cells:
        there = ", ".join(sorted({record.arm for record in records})) or "none"
        of = "" if metric == "exact" else f" with {metric}"
        of += f" where {where.text}" if where.text else ""
        how = "; only `lrsa-eval mode=generate` measures it" if metric in GENERATED else ""
        raise RecordError(f"the records hold no cell{of} of the arms and tasks asked for; arms there: {there}{how}")
    return Selection(joined, arms, tasks, references, reference)


def metric_of(joined: Joined, metric: str) -> Metric:
    """That of `METRICS`, without the word answer where prose was read."""
    prose = any(cell.positions is not None for cell in joined.cells.values())
    return replace(METRICS[metric], title=METRICS[metric].title.removeprefix("answer ")) if prose else METRICS[metric]


def columns_of(joined: Joined) -> tuple[Column, ...]:
    """Every setting that a cell was measured under, the floor first."""
    ratios: dict[Setting, list[float]] = {}
    for (_, _, setting), cell in joined.cells.items():
        ratios.setdefault(setting, []).extend(cell.ratios.values())
    return tuple(Column(setting, tuple(ratios[setting])) for setting in sorted(ratios, key=lambda one: one.order))


def plot_frame(table: ResultTable) -> pd.DataFrame:
    """The table's measured cells, seeds joined, as `figures.accuracy_figure` reads them; names are display names.
    `partner` of an arm that is another's own reference: that other.

    Raises ValueError for a table of another metric than exact match.
    """
    if table.metric.name != "exact":
        raise ValueError(f"the figure shows exact match, this table holds {table.metric.name}")
    own = table.differences if table.reference is None else ()
    partners = {row.reference: table.name(row.arm) for row in own}
    rows = [
        {
            "task": table.name(row.task),
            "arm": table.name(row.arm),
            "partner": partners.get(row.arm, ""),
            "column": column.label,
            "compression": column.setting.compression,
            "measured_ratio": cell.measured_ratio,
            "n": cell.interval.n,
            "seeds": cell.interval.seeds,
            "exact": cell.interval.mean,
            "exact_low": cell.interval.low,
            "exact_high": cell.interval.high,
        }
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.interval is not None
    ]
    frame = pd.DataFrame(rows)
    frame[["compression", "measured_ratio"]] = frame[["compression", "measured_ratio"]].astype("float64")
    return frame


def rows_for_logging(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One run's cells as flat rows for an experiment tracker: every row has the same keys; scores in percent.
    `exact_match` is token for token; `normalised_exact_match`, `f1`, `rouge_l` and `string_match` are of
    generated answers.
    """
    return [
        {
            "task": cell["task"],
            "compression": Setting.of(cell).label,
            "measured_ratio": cell.get("measured_ratio"),
            "exact_match": _percent(cell.get("exact")),
            "low": _percent(cell.get("exact_low")),
            "high": _percent(cell.get("exact_high")),
            "n": cell["n"],
            "nll": cell.get("nll"),
            "normalised_exact_match": _percent(cell.get("exact_match")),
            "f1": _percent(cell.get("f1")),
            "rouge_l": _percent(cell.get("rouge_l")),
            "string_match": _percent(cell.get("string_match")),
            "length": cell.get("length"),
            "slots": cell.get("slots"),
            "kv_bytes": sum(cell.get("kv_bytes_per_layer") or []) or None,
        }
        for cell in cells
    ]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
