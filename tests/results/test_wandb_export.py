"""W&B's offline runs and CSV exports give the frames that records give."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lrsa.config import LoggerConf
from lrsa.results import Record, cells_frame, rows_for_logging
from lrsa.results.summary import tracked_metrics
from lrsa.results.wandb_export import (
    WandbExportError,
    load_wandb,
    tracked_cells_frame,
    tracked_history_frame,
    tracked_runs_frame,
)
from lrsa.tracking import WandbRun, start_wandb
from tests.results.conftest import MakeRun, share

OUTCOMES = {("a", None): share(2, 20), ("a", 1): share(20, 20), ("a", 4): share(9, 20), ("a", "gold"): share(20, 20)}
COLUMNS = ["record", "command", "study", "arm", "seed", "column", "task", "compression", "measured_ratio", "n", "exact"]
COLUMNS += ["exact_low", "exact_high"]


def start(record: Record, resume: str | None = None) -> WandbRun:
    conf = LoggerConf(mode="offline", group="sweep", tags=["tried"])
    run = start_wandb(conf, record, f"{record.arm}-seed{record.seed}", None, resume)
    assert run is not None
    return run


@pytest.fixture
def records(make_run: MakeRun) -> Iterator[list[Record]]:
    """Two runs that W&B logged, the second in two parts."""
    made = [make_run("dense", OUTCOMES, folder="d"), make_run("lrsa", OUTCOMES, seed=2, folder="l")]
    for record, parts in zip(made, ((3,), (2, 3)), strict=True):
        first = 1
        for last in parts:
            if first > 1:
                time.sleep(1)  # W&B names a run's folder by the second
            run = start(record)
            for step in range(first, last + 1):
                run.log_metrics({"train/loss": 1 / step}, step=step)
            first = last + 1
            if last == 3:
                run.log_results(record, tracked_metrics(record.cells), rows_for_logging(record.cells))
            run.finish()
    yield made


def test_offline_runs_are_read_as_their_records_are(records: list[Record], tmp_path: Path) -> None:
    runs = load_wandb(tmp_path)
    assert [(run.name, run.group, run.job_type, run.state) for run in runs] == [
        ("dense-seed0", "sweep", "train", "finished"),
        ("lrsa-seed2", "sweep", "train", "finished"),
    ]
    expected = cells_frame(records)[COLUMNS]
    found = tracked_cells_frame(runs)
    order = {"floor": 0, "gold": 1, "full": 2, "4x": 3}
    expected = expected.sort_values(["record", "column"], key=lambda one: one.replace(order), ignore_index=True)
    found = found.sort_values(["record", "column"], key=lambda one: one.replace(order), ignore_index=True)
    pd.testing.assert_frame_equal(found[COLUMNS], expected, check_dtype=False)
    assert found["nll"].tolist() == [0.5] * 8

    history = tracked_history_frame(runs)
    assert history[history["arm"] == "lrsa"]["step"].tolist() == [1, 2, 3], "both parts of the resumed run"
    assert history[history["arm"] == "dense"]["loss"].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    table = tracked_runs_frame(runs).set_index("arm")
    assert table.loc["lrsa", "recipe.knob"] == 0 and table.loc["lrsa", "eval/a/4x/exact"] == pytest.approx(0.45)
    assert table.loc["dense", "tags"] == "tried,synthetic,dense"


def test_a_csv_of_the_runs_table_is_read_alike(records: list[Record], tmp_path: Path) -> None:
    """As W&B's site exports it: a row a run, settings and summary side by side, gaps where a run has no value."""
    offline = load_wandb(tmp_path)
    table = tracked_runs_frame(offline).rename(
        columns={"name": "Name", "state": "State", "tags": "Tags", "id": "ID", "started": "Created"}
    )
    table.loc[0, "eval/a/gold/exact"] = np.nan
    table.to_csv(tmp_path / "export.csv", index=False)
    runs = load_wandb(tmp_path / "export.csv")
    assert [run.id for run in runs] == [run.id for run in offline] and runs[0].tags == ("tried", "synthetic", "dense")
    found, expected = tracked_cells_frame(runs), tracked_cells_frame(offline)
    assert found["exact"].isna().sum() == 1
    same = found["exact"].notna()
    pd.testing.assert_frame_equal(found[same][COLUMNS], expected[same][COLUMNS], check_dtype=False)
    assert tracked_history_frame(runs).empty


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no folder, .wandb file or .csv file is there"),
        ("runs.csv", "a,b\n1,2\n", "has no column Name"),
        ("run-x.wandb", "hello world", "run-x.wandb: .*bad header"),
        ("run-y.wandb", "", "is empty: its run was killed"),
    ],
)
def test_what_is_no_wandb_run_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(WandbExportError, match=message):
        load_wandb(tmp_path / name)
    with pytest.raises(WandbExportError, match="holds no W&B run"):
        (tmp_path / "folder").mkdir()
        load_wandb(tmp_path / "folder")


def test_a_killed_run_is_read_as_far_as_it_came(records: list[Record], tmp_path: Path) -> None:
    (whole,) = (tmp_path / "runs" / "d").glob("wandb/offline-run-*/*.wandb")
    cut = tmp_path / "cut" / "offline-run-1-x" / whole.name
    cut.parent.mkdir(parents=True)
    content = whole.read_bytes()
    cut.write_bytes(content[: content.index(b"eval/a")])
    (run,) = load_wandb(cut)
    (cut.parent / "run-empty.wandb").touch()
    with pytest.warns(UserWarning, match=r"left out: .*run-empty\.wandb is empty"):
        assert load_wandb(tmp_path / "cut") == [run]
    assert run.state == "running" and run.config["arm"] == "dense" and "score" not in run.summary
    assert [row["train/loss"] for row in run.history] == pytest.approx([1, 1 / 2, 1 / 3])
