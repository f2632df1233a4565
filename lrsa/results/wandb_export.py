"""W&B runs as the frames that records give: from offline run folders, or from the runs table that W&B's site exports.

>>> runs = load_wandb("multirun/mine")  # searched for offline runs; or a run's folder, or an exported runs.csv
>>> tracked_cells_frame(runs)  # as store.cells_frame of the records
>>> tracked_runs_frame(runs)  # a row a run, its settings and its numbers
>>> tracked_history_frame(runs)  # a row a logged step

The names are those of conf/logger/wandb.yaml. Offline runs are read by W&B's own reader, `wandb leet inspect`.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lrsa.results.store import Setting
from lrsa.results.summary import TrackedName

STEP = "trainer/global_step"
_IDENTITY = {"record": "record_id", "command": "command", "study": "study", "arm": "arm", "seed": "seed"}


class WandbExportError(ValueError):
    """What is no W&B run; the message names the file."""


class NothingLogged(WandbExportError):
    """A run was killed before W&B wrote anything."""


@dataclass(frozen=True)
class TrackedRun:
    """A W&B run, its parts in order where it was resumed. `history`: a mapping a logged step, none from a CSV."""

    id: str
    name: str
    state: str  # finished, failed, running (or killed), crashed
    started: str = ""  # UTC, ISO 8601
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """record, command, study, arm and seed, as the frames of records begin with them."""
        values = {column: self.config.get(name) for column, name in _IDENTITY.items()}
        return {**values, "record": values["record"] or self.id}


def load_wandb(*places: str | Path) -> list[TrackedRun]:
    """All runs of the places: a `.wandb` file, a folder below which to look for such, or an exported CSV. A run in a
    folder that was killed before W&B wrote anything is left out, with a warning.

    Raises WandbExportError for a place that does not exist, is none of these, or holds no run.
    """
    runs: list[TrackedRun] = []
    for place in map(Path, places):
        if place.suffix == ".csv" and place.is_file():
            runs += _read_csv(place)
        elif place.suffix == ".wandb" and place.is_file():
            runs.append(_read_offline(place))
        elif place.is_dir():
            found = list(_read_folder(place))
            if not found:
                raise WandbExportError(f"{place} holds no W&B run (a folder offline-run-*/ with a .wandb file)")
            runs += sorted(found, key=lambda run: pd.Timestamp(run.started))
        else:
            raise WandbExportError(f"{place}: no folder, .wandb file or .csv file is there")
    return _joined(runs)


def _read_folder(folder: Path) -> Iterator[TrackedRun]:
    for file in folder.rglob("run-*.wandb"):
        try:
            yield _read_offline(file)
        except NothingLogged as error:
            warnings.warn(f"left out: {error}", stacklevel=3)


def _read_offline(file: Path) -> TrackedRun:
    state = json.loads(_inspect(file, "-summary"))
    if not state["run_id"]:
        raise NothingLogged(f"{file} is empty: its run was killed before W&B wrote anything")
    entries = [json.loads(line) for line in _inspect(file).splitlines()]
    (run, *_) = [entry["run"] for entry in entries if entry["type"] == "run"]
    return TrackedRun(
        id=state["run_id"],
        name=state["name"],
        state=state["state"],
        started=state["start_time"],
        group=run.get("run_group", ""),
        job_type=run.get("job_type", ""),
        tags=tuple(state["tags"]),
        config=state["config"],
        summary=state["summary"],
        history=tuple(entry["history"]["item"] for entry in entries if entry["type"] == "history"),
    )


def _inspect(file: Path, *options: str) -> str:
    """The program behind `wandb leet inspect`, called without the second that the command itself takes to start."""
    from wandb.util import get_core_path

    file = file.resolve()
    program = [get_core_path(), "leet", "inspect", "-no-observability", "-json", *options]
    done = subprocess.run(
        [*program, "-run-file", str(file), str(file.parent.parent)], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise WandbExportError(f"{file}: {done.stderr.strip()}")
    return done.stdout


def _joined(runs: Iterable[TrackedRun]) -> list[TrackedRun]:
    """Parts of a resumed run, which share its id, as one: the last one's state and config, and what all logged."""
    parts: dict[str, list[TrackedRun]] = {}
    for run in runs:
        parts.setdefault(run.id, []).append(run)
    return [
        replace(
            same[-1],
            summary={name: value for part in same for name, value in part.summary.items()},
            history=tuple(row for part in same for row in part.history),
        )
        for same in parts.values()
    ]


_OF_EXPORT = {
    "ID": "id",
    "Name": "name",
    "State": "state",
    "Created": "started",
    "Group": "group",
    "Job Type": "job_type",
}


def _read_csv(file: Path) -> list[TrackedRun]:
    table = pd.read_csv(file)
    if "Name" not in table:
        raise WandbExportError(f"{file} has no column Name: export the runs table of a W&B project as CSV")
    runs = []
    for number, row in enumerate(table.to_dict("records")):
        values = {str(name): value for name, value in row.items() if not pd.isna(value)}
        known: Any = {attribute: str(values.pop(name, "")) for name, attribute in _OF_EXPORT.items()}
        known["id"] = known["id"] or f"{file.name}:{number}"
        tags = tuple(tag.strip() for tag in str(values.pop("Tags", "")).split(",") if tag.strip())
        logged = {name: value for name, value in values.items() if "/" in name or name in ("score", "error")}
        config = {name: value for name, value in values.items() if name not in logged}
        runs.append(replace(TrackedRun(**known), tags=tags, config=config, summary=logged))
    return runs


def tracked_cells_frame(runs: Sequence[TrackedRun]) -> pd.DataFrame:
    """A row a cell, columns as in `store.cells_frame`: what the run is, column, task, compression, and its numbers."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        cells: dict[str, dict[Setting, dict[str, Any]]] = {}
        for name, value in run.summary.items():
            parsed = TrackedName.parse(name)
            if parsed is not None:
                settings = cells.setdefault(parsed.task, {})
                settings.setdefault(_setting(parsed.column), {})[parsed.metric] = value
        for task, settings in cells.items():
            for setting in sorted(settings, key=lambda one: one.order):
                where = {"column": setting.label, "task": task, "compression": setting.compression}
                rows.append({**run.identity, **where, **settings[setting], "context": setting.context})
    leading = [*_IDENTITY, "column", "task", "compression", "measured_ratio", "n", "exact", "exact_low", "exact_high"]
    frame = pd.DataFrame(rows)
    frame = frame.reindex(columns=[*leading, *(name for name in frame if name not in leading)])
    frame[["compression", "measured_ratio"]] = frame[["compression", "measured_ratio"]].astype("float64")
    return frame


def _setting(column: str) -> Setting:
    """That of a column's label."""
    named = {"floor": Setting(None, "none"), "full": Setting(1.0), "gold": Setting(1.0, "gold")}
    return named[column] if column in named else Setting(float(column.removesuffix("x")))


def tracked_runs_frame(runs: Sequence[TrackedRun]) -> pd.DataFrame:
    """A row a run: id, name, state, group, job type, tags, its settings (groups as `recipe.learning_rate`), and its
    numbers.
    """
    rows = [
        {
            **{name: getattr(run, name) for name in ("id", "name", "state", "started", "group", "job_type")},
            "tags": ",".join(run.tags),
            **pd.json_normalize(dict(run.config)).to_dict("records")[0],
            **{name: value for name, value in run.summary.items() if not isinstance(value, Mapping)},
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


def tracked_history_frame(runs: Sequence[TrackedRun]) -> pd.DataFrame:
    """A row a logged training step: run, arm, seed, `step` (optimiser steps) and what was logged, `train/loss` as
    `loss`.
    """
    rows = [
        {"run": run.name, "arm": run.config.get("arm"), "seed": run.config.get("seed"), "step": row[STEP]}
        | {name.removeprefix("train/"): value for name, value in row.items() if name.startswith("train/")}
        for run in runs
        for row in run.history
        if STEP in row
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "arm", "seed", "step", "loss"])
