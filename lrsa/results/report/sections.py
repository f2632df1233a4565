"""What the report says of runs: what they are, in what they differ, where they ran, what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrsa.results.diffs import ABSENT, differences, short_names, shown
from lrsa.results.record import Record
from lrsa.results.tables import Cell, ResultTable, Row


@dataclass(frozen=True)
class CellView:
    """A table's cell as text: number, interval, and what it sorts by. `clear`: of a difference whose interval is clear
    of 0, `better` or `worse`.
    """

    mean: str
    interval: str
    n: str
    best: bool
    clear: str
    order: float | None


@dataclass(frozen=True)
class TableView:
    """A table, or its differences: `header` after task, arm and n."""

    title: str
    header: list[tuple[str, str]]  # label, measured ratio
    rows: list[tuple[str, str, str, list[CellView]]]  # task, arm, n, cells


@dataclass(frozen=True)
class PlainTable:
    """A table of texts as they are, such as a benchmark's."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def metrics_view(records: Sequence[Record], names: Mapping[str, str]) -> PlainTable | None:
    """The numbers of finished runs that scored no task of ours, as `lrsa-eval mode=lm_eval`: a row a metric, a column a
    run; None where there are none.
    """
    found = {
        f"{names.get(record.arm, record.arm)}, seed {record.seed}": {
            name: value for name, value in record.metrics.items() if isinstance(value, int | float)
        }
        for record in records
        if record.status == "finished" and not record.cells and record.command != "lrsa-bench"
    }
    rows = dict.fromkeys(name for values in found.values() for name in values)
    if not rows:
        return None
    cells = [[name, *(f"{v[name]:.4g}" if name in v else "missing" for v in found.values())] for name in rows]
    return PlainTable("Metrics as recorded", ["metric", *found], cells)


def table_views(table: ResultTable) -> list[TableView]:
    """Values, and differences where there are any: the numbers of `lrsa-table`, to the letter."""
    header = [(column.label, column.header.partition(" ")[2].strip("()")) for column in table.columns]
    views = []
    for title, rows in ((table.metric.title, table.rows), (f"{table.difference_title}, paired", table.differences)):
        if rows:
            found = [
                (
                    _task(table, row),
                    table.row_name(row),
                    row.size or "see cells",
                    [_cell(table, row, cell) for cell in row.cells],
                )
                for row in rows
            ]
            views.append(TableView(title[:1].upper() + title[1:], header, found))
    return views


def _task(table: ResultTable, row: Row) -> str:
    return table.name(row.task) if row.positions is None else f"{table.name(row.task)} {row.positions[0]:,} on"


def _cell(table: ResultTable, row: Row, cell: Cell) -> CellView:
    n = "" if row.size or cell.weight is None else f"n = {cell.weight.size}"
    interval = cell.interval
    if interval is None:
        return CellView(cell.absent, "", n, False, "", None)
    scale, digits = table.metric.scale, table.metric.digits
    mean, low, high = (interval.number(value, scale, digits) for value in (interval.mean, interval.low, interval.high))
    gains = (interval.mean > 0) == table.metric.higher_is_better
    clear = ("better" if gains else "worse") if interval.difference and interval.excludes_zero else ""
    return CellView(mean, f"[{low}, {high}]", n, cell.best, clear, interval.mean)


@dataclass(frozen=True)
class RunView:
    """A run, with what is folded away beneath it."""

    anchor: str
    record: Record
    arm: str
    wall: str
    config: str
    overrides: str
    error: str
    traceback: str


def run_views(records: Sequence[Record], names: Mapping[str, str]) -> list[RunView]:
    """Every run, in the order of `records`."""
    return [
        RunView(
            f"run-{number}",
            record,
            names.get(record.arm, record.arm),
            duration(record.wall_s),
            json.dumps(record.config, indent=2, ensure_ascii=False, sort_keys=True),
            "\n".join(record.overrides),
            _why(record),
            str((record.error or {}).get("traceback") or ""),
        )
        for number, record in enumerate(records)
    ]


def _why(record: Record) -> str:
    if record.status == "failed":
        error = record.error or {}
        return f"{error.get('type') or 'error'}: {error.get('message') or 'no message'}"
    if record.status == "running":
        return f"unfinished since {record.started}: still running, or killed"
    return ""


@dataclass(frozen=True)
class DiffView:
    """Keys that differ, a column an arm: `rows` hold the key, its short name, and each arm's values."""

    arms: list[str]
    rows: list[tuple[str, str, list[str]]]


def diff_view(records: Sequence[Record], names: Mapping[str, str]) -> DiffView:
    """In what the configs of the runs differ, arm by arm; seeds of an arm that differ stand together in its cell."""
    arms = list(dict.fromkeys(record.arm for record in records))
    found = differences(records)
    rows = []
    short = short_names(list(found))
    for key, values in found.items():
        cells = []
        for arm in arms:
            own = dict.fromkeys(
                value for record, value in zip(records, values, strict=True) if record.arm == arm and value != ABSENT
            )
            cells.append(", ".join(own) or "–")
        rows.append((key, short[key], cells))
    return DiffView([names.get(arm, arm) for arm in arms], rows)


def environment(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, list[tuple[str, int]]]]]]:
    """Sections of (name, values with how many runs have each): code, hardware, packages, seeds."""
    packages = sorted({name for record in records for name in record.versions})
    hardware = dict.fromkeys(key for record in records for key in record.hardware)
    return [
        ("Code", [("git commit", _counted(records, _commit)), ("command", _counted(records, lambda r: r.command))]),
        ("Runs", [("seed", _counted(records, lambda r: str(r.seed))), ("study", _counted(records, lambda r: r.study))]),
        ("Hardware", [(key.replace("_", " "), _counted(records, _of_hardware(key))) for key in hardware]),
        ("Packages", [(name, _counted(records, _of_package(name))) for name in packages]),
    ]


def _commit(record: Record) -> str:
    commit = record.git.get("commit")
    dirty = record.git.get("dirty")
    return (commit or "unknown") + (" with uncommitted changes" if dirty else "")


def _of_package(name: str) -> Callable[[Record], str]:
    return lambda record: record.versions.get(name, "not installed")


def _of_hardware(key: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        value = record.hardware.get(key, "–")
        return f"{value / 2**30:.1f} GiB" if key.endswith("bytes") and isinstance(value, int) else shown(value)

    return text


def _counted(records: Sequence[Record], text: Callable[[Record], str]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for record in records:
        found[text(record)] = found.get(text(record), 0) + 1
    return list(found.items())


def data_view(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every data set that was read, once: name, origin, n, fingerprint, template, and the number of runs."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for item in record.data:
            key = json.dumps([item.get(name) for name in ("name", "fingerprint", "n", "template")])
            entry = found.setdefault(key, {**item, "runs": 0})
            entry["runs"] += 1
    return list(found.values())


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
