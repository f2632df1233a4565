"""Records gathered from folders, and as pandas frames."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lrsa.results.record import RECORD_FILE, Record, RecordError
from lrsa.results.setting import Setting

_NEVER_IN = frozenset({"wandb", "checkpoints", "__pycache__"})  # large, and they hold no records


class UnfinishedRecord(UserWarning):
    """A record was left out: its run is still going, was killed, or failed."""


def load_records(*folders: str | Path, unfinished: bool = False, study: str | None = None) -> list[Record]:
    """All records below `folders` (or record files), sorted by path, each once.

    Records that are not `finished` are left out with an `UnfinishedRecord` warning, or kept with `unfinished=True`.
    Raises RecordError for a folder that does not exist, for a damaged record, and when nothing is found.
    """
    files = sorted({file.resolve(): file for folder in folders for file in record_files(Path(folder))}.values())
    return choose(map(Record.load, files), folders, unfinished, study)


def choose(
    records: Iterable[Record], folders: Sequence[str | Path], unfinished: bool = False, study: str | None = None
) -> list[Record]:
    """What `load_records` keeps of the `records` found in `folders`."""
    kept, found = [], 0
    for found, record in enumerate(records, 1):  # noqa: B007  # counted
        if study is not None and record.study != study:
            continue
        if record.status == "finished" or unfinished:
            kept.append(record)
        else:
            warnings.warn(_why_left_out(record), UnfinishedRecord, stacklevel=3)
    if not kept:
        where = ", ".join(str(folder) for folder in folders) or "no folder"
        of_study = f" of study '{study}'" if study else ""
        raise RecordError(
            f"no finished records{of_study} in {where} ({found} {RECORD_FILE} found there). "
            "Run lrsa-train or lrsa-eval first, or name the folder that holds their run folders"
        )
    return kept


def record_files(folder: Path) -> Iterable[Path]:
    """Record files below a folder, or the file itself. Raises RecordError where there is neither."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder} to read records from")
    found = []
    for root, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in _NEVER_IN and not name.startswith("."))
        if RECORD_FILE in names:
            found.append(Path(root) / RECORD_FILE)
    return found


def _why_left_out(record: Record) -> str:
    if record.status == "failed":
        error = record.error or {}
        first_line = str(error.get("message") or "").partition("\n")[0]
        return f"{record.path} left out: failed with {error.get('type')}: {first_line}"
    return f"{record.path} left out: unfinished, started {record.started} (still running, or killed)"


# The columns that both frames begin with: what the run is, and which cell.
_LEADING = ["record", "command", "study", "arm", "seed", "column", "task", "compression"]


def cells_frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row a cell: what the run is (record, command, study, arm, seed), `column` (`floor`, `gold`, `full`, `4x`),
    and the cell's fields.
    """
    rows: list[dict[str, Any]] = [
        {**identity(record), "column": Setting.of(cell).label, **cell, "context": Setting.of(cell).context}
        for record in records
        for cell in record.cells
    ]
    columns = [
        *_LEADING,
        "measured_ratio",
        "n",
        "exact",
        "exact_low",
        "exact_high",
    ]
    frame = pd.DataFrame(rows)
    for name in columns:
        if name not in frame:
            frame[name] = pd.Series(dtype="object")
    frame[["compression", "measured_ratio"]] = frame[["compression", "measured_ratio"]].astype("float64")
    return frame[columns + [name for name in frame.columns if name not in columns]]


def outcomes_frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row an example and cell: what the run is, `column`, and the outcome's own fields."""
    rows: list[dict[str, Any]] = [
        {**identity(record), "column": Setting.of(row).label, **row} for record in records for row in record.outcomes()
    ]
    columns = [
        *_LEADING,
        "id",
        "exact",
        "nll",
        "tokens",
    ]
    more = dict.fromkeys(name for row in rows for name in row if name not in columns)  # of generated answers
    frame = pd.DataFrame(rows, columns=[*columns, *more])
    frame[["compression", "nll"]] = frame[["compression", "nll"]].astype("float64")
    return frame


def identity(record: Record) -> dict[str, Any]:
    """What a run is: the columns that its rows in a frame begin with."""
    return {
        "record": record.id,
        "command": record.command,
        "study": record.study,
        "arm": record.arm,
        "seed": record.seed,
    }
