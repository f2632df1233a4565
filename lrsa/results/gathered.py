"""Records gathered into Parquet files, which pandas and DuckDB read in one line and which answer tables in seconds.

    pd.read_parquet("store/cells.parquet")      a row a cell: what the run is, its config by dotted keys, the cell
    pd.read_parquet("store/outcomes.parquet")   a row an example and cell
    duckdb.sql("SELECT arm, avg(exact) FROM 'store/cells.parquet' WHERE compression = 4 GROUP BY arm")

The record files are the truth. A third file, records.parquet, holds every record as it was read, beside size and time
of its files: what changed since is read anew, what is gone is dropped, and a store that is damaged is made again.
"""

from __future__ import annotations

import functools
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrsa.results.keys import flat
from lrsa.results.record import OUTCOMES_FILE, Examples, Record, RecordError
from lrsa.results.setting import Setting
from lrsa.results.store import identity, record_files

RECORDS, CELLS, OUTCOMES = "records.parquet", "cells.parquet", "outcomes.parquet"
_MARK = b"lrsa_store"  # in each file's metadata: those of one writing have the same
Slice = tuple[str, float | None, str, int, int]  # task, compression, context, first row, row after the last


class Gathered(NamedTuple):
    """All records below the folders, whatever their status, and how many of them had to be read anew."""

    records: list[Record]
    read: int


def gather(folders: Iterable[str | Path], store: str | Path) -> Gathered:
    """Bring the store in the folder `store` up to date with the records below `folders`, which it then holds alone.

    Raises RecordError for a folder that does not exist, for a damaged record, and where another process writes it too.
    """
    store = Path(store)
    files = sorted({file.resolve(): file for folder in folders for file in record_files(Path(folder))}.values())
    found = {os.path.relpath(file, store): file for file in files}
    stamps = {path: _stamp(file) for path, file in found.items()}
    held = _read(store)
    changed = [path for path in found if path not in held or held[path].stamp != stamps[path]]
    if changed or held.keys() != found.keys():
        fresh = {path: _Entry.of(Record.load(found[path]), stamps[path]) for path in changed}
        _write(store, {path: fresh.get(path) or held[path] for path in found})
        held = _read(store)
        if held.keys() != found.keys():
            raise RecordError(f"{store}: another process wrote the store at the same time; run the command again")
    source = _Outcomes(store / OUTCOMES)
    return Gathered([held[path].record(Path(os.path.normpath(store / path)), source) for path in found], len(changed))


def _stamp(file: Path) -> str:
    stats = [path.stat() for path in (file, file.with_name(OUTCOMES_FILE)) if path.exists()]
    return json.dumps([[stat.st_size, stat.st_mtime_ns] for stat in stats])


@dataclass
class StoredRecord(Record):
    """A record as a store holds it; its examples are `slices` of the store's outcomes."""

    source: _Outcomes | None = None
    slices: tuple[Slice, ...] = ()

    def examples(self, metrics: Sequence[str]) -> dict[tuple[str, Setting], Examples]:
        """As `Record.examples`."""
        assert self.source is not None
        ids, columns = self.source.ids, {name: self.source.column(name) for name in metrics}
        return {
            (task, Setting(compression, context)): Examples(
                ids[start:end], {name: values[start:end] for name, values in columns.items()}
            )
            for task, compression, context, start, end in self.slices
        }


class _Outcomes:
    """The columns of outcomes.parquet, each read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: dict[str, list[float]] = {}

    @functools.cached_property
    def ids(self) -> list[str]:
        column = pq.read_table(self.path, columns=["id"], read_dictionary=["id"])["id"].combine_chunks()
        names = np.array(column.dictionary.to_pylist(), dtype=object)
        ids: list[str] = names[column.indices.to_numpy()].tolist()
        return ids

    def column(self, name: str) -> list[float]:
        if name not in self._columns:
            if name in pq.read_schema(self.path).names:
                values = pq.read_table(self.path, columns=[name])[name].cast(pa.float64())
                self._columns[name] = values.to_numpy().tolist()
            else:
                self._columns[name] = [math.nan] * len(self.ids)
        return self._columns[name]


@dataclass
class _Entry:
    """One record in the store: `value` as its file has it, `outcomes` sorted by cell, `slices` of these rows."""

    stamp: str
    value: dict[str, Any]
    slices: tuple[Slice, ...]
    outcomes: Any  # an Arrow table, None for those that the store holds
    first: int = 0  # row of the store's outcomes

    @classmethod
    def of(cls, record: Record, stamp: str) -> _Entry:
        rows: list[dict[str, Any]] = []
        slices: list[Slice] = []
        if record.cells:
            record.examples([])  # refuses an example that is there twice
            by_cell: dict[tuple[str, Setting], list[dict[str, Any]]] = {}
            for row in record.outcomes():
                by_cell.setdefault((row["task"], Setting.of(row)), []).append(row)
            for (task, setting), same in by_cell.items():
                slices.append((task, setting.compression, setting.context, len(rows), len(rows) + len(same)))
                said = {**identity(record), "column": setting.label, "context": setting.context}
                rows += [{**said, **row, **_numbers(row)} for row in same]
        return cls(stamp, record.to_dict(), tuple(slices), pa.Table.from_pylist(rows))

    def record(self, file: Path, source: _Outcomes) -> StoredRecord:
        shifted = (
            (task, compression, context, self.first + start, self.first + end)
            for task, compression, context, start, end in self.slices
        )
        return StoredRecord.from_dict(file.parent, self.value, source=source, slices=tuple(shifted))


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers of one record and fractions of another are one column."""
    return {name: float(value) for name, value in row.items() if type(value) is int and name != "tokens"}


def _read(store: Path) -> dict[str, _Entry]:
    """What the store holds, by path; nothing where its files are not there, damaged, or not of one writing."""
    try:
        tables = {name: pq.ParquetFile(store / name) for name in (RECORDS, CELLS, OUTCOMES)}
        if len({table.schema_arrow.metadata[_MARK] for table in tables.values()}) > 1:
            return {}
        rows, first, entries = tables[RECORDS].read().to_pylist(), 0, {}
        for row in rows:
            slices = tuple((*kept,) for kept in json.loads(row["slices"]))
            entries[row["path"]] = _Entry(row["stamp"], json.loads(row["record"]), slices, None, first)
            first += row["outcomes"]
        return entries if first == tables[OUTCOMES].metadata.num_rows else {}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return {}


def _write(store: Path, entries: Mapping[str, _Entry]) -> None:
    """Replace the three files; outcomes of entries that are not new come from the store itself."""
    store.mkdir(parents=True, exist_ok=True)
    old = pq.read_table(store / OUTCOMES) if any(entry.outcomes is None for entry in entries.values()) else None
    parts, rows, cells = [], [], []
    for path, entry in entries.items():
        if entry.outcomes is None:
            assert old is not None
            entry.outcomes = old.slice(entry.first, max((kept[-1] for kept in entry.slices), default=0))
        parts.append(entry.outcomes)
        count, record = entry.outcomes.num_rows, json.dumps(entry.value)
        rows.append({"path": path, "stamp": entry.stamp, "outcomes": count, "slices": json.dumps(entry.slices)})
        rows[-1]["record"] = record
        cells += _cell_rows(path, Record.from_dict(Path(path).parent, entry.value))
    mark = {_MARK: uuid.uuid4().hex.encode()}
    filled = [part for part in parts if part.num_rows] or [pa.table({"id": pa.array([], pa.string())})]
    tables = {
        OUTCOMES: pa.concat_tables(filled, promote_options="permissive"),
        CELLS: pa.Table.from_pylist(_alike(cells)),
        RECORDS: pa.Table.from_pylist(rows),
    }
    for name, table in tables.items():
        partial = store / f".{name}.{os.getpid()}"
        pq.write_table(table.replace_schema_metadata(mark), partial, compression="zstd")
        os.replace(partial, store / name)


def _cell_rows(path: str, record: Record) -> list[dict[str, Any]]:
    config = {key: value for key, value in flat(record.config).items() if "." in key}
    said = {**identity(record), "path": path, "finished": record.finished, "git.commit": record.git.get("commit")}
    return [
        {**said, "column": Setting.of(cell).label, **cell, "context": Setting.of(cell).context, **config}
        for cell in record.cells
    ]


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the same keys each, a column of one kind: whole numbers as fractions where one is; lists, mappings
    and columns of several kinds as JSON.
    """
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).update(() if value is None else (type(value),))
    plain = {key: found <= {int, float} or (len(found) == 1 and found <= {str, bool}) for key, found in kinds.items()}
    return [
        {
            key: _cast(row.get(key), found, plain[key]) for key, found in kinds.items()
        }
        for row in rows
    ]  # fmt: skip


def _cast(value: Any, kinds: set[type], plain: bool) -> Any:
    if value is None:
        return None
    if not plain:
        return json.dumps(value, sort_keys=True)
    return float(value) if float in kinds else value
