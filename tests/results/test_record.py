"""A record says what happened: before, after, and when nothing came after."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lrsa.results import Record, RecordError, downsample, environment, schema
from lrsa.results.record import config_id, write_atomically

from .conftest import MakeRun, share


def start(folder: Path, **changes: object) -> Record:
    options: dict = {"command": "lrsa-train", "study": "s", "arm": "dense", "seed": 0, "config": {"a": 1}} | changes
    return Record.start(folder, **options)


@dataclass(frozen=True)
class Outcome:
    task: str
    id: str
    compression: float | None
    exact: bool
    nll: float
    tokens: int


def test_running_is_written_before_the_work(tmp_path: Path) -> None:
    record = start(
        tmp_path / "run", overrides=["a=1"], data=[{"name": "d", "fingerprint": "f", "n": 3, "template": "t"}]
    )
    on_disk = Record.load(tmp_path / "run")
    assert on_disk.status == "running" and on_disk.finished is None
    assert on_disk == record
    assert on_disk.overrides == ["a=1"] and on_disk.data[0]["fingerprint"] == "f"
    assert on_disk.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(on_disk.git) == {"commit", "dirty"}
    assert on_disk.hardware["cpu_cores"] >= 1 and on_disk.hardware["memory_bytes"] > 0


def test_finish_keeps_outcomes_and_cells(tmp_path: Path, make_run: MakeRun) -> None:
    record = make_run("dense", {("needles", 4): share(3, 5)})
    loaded = Record.load(record.folder)
    assert loaded.status == "finished" and loaded.wall_s is not None and loaded.wall_s >= 0
    assert loaded.cells[0]["exact"] == pytest.approx(0.6)
    assert [row["exact"] for row in loaded.outcomes()] == [True, True, True, False, False]
    assert not list(record.folder.glob(".*tmp"))


def test_numbers_of_numpy_and_non_finite_ones(tmp_path: Path) -> None:
    record = start(tmp_path)
    outcome = Outcome("t", "0", np.float64(4), bool(np.bool_(True)), 0.123456789, 2)
    record.finish({"loss": float("nan"), "steps": np.int64(3), "curve": np.arange(2)}, outcomes=[outcome])
    assert Record.load(tmp_path).metrics == {"loss": None, "steps": 3, "curve": [0, 1]}
    assert Record.load(tmp_path).outcomes()[0] == {
        "task": "t",
        "id": "0",
        "compression": 4.0,
        "exact": True,
        "nll": 0.123457,
        "tokens": 2,
    }


def test_failure_is_recorded_and_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"), start(tmp_path):
        raise RuntimeError("out of luck")
    loaded = Record.load(tmp_path)
    assert loaded.status == "failed" and loaded.error is not None
    assert loaded.error["type"] == "RuntimeError" and "out of luck" in loaded.error["traceback"]


def test_leaving_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with start(tmp_path):
        pass
    assert Record.load(tmp_path).status == "failed"


def test_a_killed_process_leaves_running(tmp_path: Path) -> None:
    code = (
        "import sys, time; from lrsa.results.record import Record\n"
        "with Record.start(sys.argv[1], command='c', study='s', arm='a', seed=0, config={}):\n"
        "    print('started', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert Record.load(tmp_path).status == "running"


def test_started_again(tmp_path: Path) -> None:
    start(tmp_path).fail(KeyboardInterrupt())
    record = start(tmp_path)
    assert record.attempt == 2
    record.finish()
    with pytest.raises(RecordError, match="is a finished record; choose another run folder"):
        start(tmp_path)


def test_same_work_same_bytes(tmp_path: Path, make_run: MakeRun) -> None:
    outcomes = {("needles", 4): share(3, 5), ("needles", None): share(0, 5)}
    one, two = make_run("dense", outcomes, folder="one"), make_run("dense", outcomes, folder="two")
    assert (one.folder / "outcomes.jsonl.gz").read_bytes() == (two.folder / "outcomes.jsonl.gz").read_bytes()
    times = {"started", "finished", "wall_s"}
    a, b = (json.loads(record.path.read_text()) for record in (one, two))
    assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}
    assert list(a) == sorted(a)


def test_id_is_of_what_is_computed() -> None:
    config = {"run": {"output_dir": "x", "seed": 0}, "recipe": {"steps": 3}, "logger": {"wandb": True}}
    moved = {**config, "run": {"output_dir": "y", "seed": 0}, "logger": {"wandb": False}}
    other = {**config, "recipe": {"steps": 4}}
    assert config_id("c", config) == config_id("c", moved) != config_id("c", other)
    named, unnamed = ({**config, "model": {"name": "x", **more}} for more in ({"ranked_on": {"hidden_size": 8}}, {}))
    assert config_id("c", named) == config_id("c", unnamed), "it is only checked"


def test_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, run = tmp_path / "home" / "somebody", tmp_path / "home" / "somebody" / "project" / "run"
    run.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project")
    config = {
        "out": str(run),
        "data": f"{home}/data",
        "here": f"{home}/project/x",
        "other": f"{home}body/x",
        "n": [str(run / "m")],
    }
    record = start(run, config=config, overrides=[f"data={home}/data"])
    assert record.config == {
        "out": "<run>",
        "data": "~/data",
        "here": "<cwd>/x",
        "other": f"{home}body/x",
        "n": ["<run>/m"],
    }
    assert record.overrides == ["data=~/data"]
    record.fail(ValueError(f"cannot read {home}/data/x.json"))
    assert "~/data/x.json" in record.path.read_text()


def test_git_state_of_no_checkout(tmp_path: Path) -> None:
    assert environment.git_state(tmp_path) == {"commit": None, "dirty": None}


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], check=True)
    clean = environment.git_state(package)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "result.txt").write_text("an untracked result is no change of the code")
    assert environment.git_state(package)["dirty"] is False
    (package / "a.py").write_text("2\n")
    assert environment.git_state(package) == {**clean, "dirty": True}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "b.py").write_text("not of this checkout\n")
    assert environment.git_state(tmp_path / "site") == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, r"field 'seed': expected a whole number, found '0'"),
        ({"seed": True}, r"field 'seed': expected a whole number, found True"),
        ({"status": "done"}, r"field 'status': expected one of running, finished, failed, found 'done'"),
        ({"schema": 99}, r"field 'schema': this version of lrsa reads 1, found 99"),
        ({"config": None}, r"field 'config': expected a mapping, found None"),
        ({"cells": [{"task": "t"}]}, r"field 'cells\[0\].compression' is missing"),
        ({"data": [{"name": 1}]}, r"field 'data\[0\].name': expected text, found 1"),
    ],
)
def test_a_damaged_record_names_file_and_field(tmp_path: Path, change: dict, message: str) -> None:
    record = start(tmp_path)
    record.path.write_text(json.dumps(json.loads(record.path.read_text()) | change))
    with pytest.raises(RecordError, match=message) as error:
        Record.load(tmp_path)
    assert str(record.path) in str(error.value)


def test_half_a_record_and_half_an_outcomes_file(tmp_path: Path, make_run: MakeRun) -> None:
    record = make_run("dense", {("needles", 4): share(3, 5)})
    outcomes = record.folder / "outcomes.jsonl.gz"
    outcomes.write_bytes(outcomes.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"outcomes\.jsonl\.gz"):
        Record.load(record.folder).outcomes()
    record.path.write_text(record.path.read_text()[:100])
    with pytest.raises(RecordError, match=r"record\.json: .*line"):
        Record.load(record.folder)
    with pytest.raises(RecordError, match="No such file"):
        Record.load(tmp_path / "nowhere.json")


def test_a_wrong_outcome_or_cell_is_refused_when_written(tmp_path: Path) -> None:
    record = start(tmp_path)
    good = Outcome("t", "0", 4, True, 0.1, 2)
    with pytest.raises(RecordError, match="outcome 1: field 'id' is missing"):
        record.finish(outcomes=[good, {"task": "t"}])
    with pytest.raises(RecordError, match=r"field 'cells\[0\].n'"):
        record.finish(cells=[{"task": "t", "compression": 4, "n": 2.5, "exact": 1, "exact_low": 1, "exact_high": 1}])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_downsample_averages_stretches() -> None:
    assert downsample([1, 2, 3, 4], [4.0, 2.0, 1.0, 3.0], points=2) == {"step": [2, 4], "loss": [3.0, 2.0]}
    assert downsample([1, 2], [4.0, 2.0]) == {"step": [1, 2], "loss": [4.0, 2.0]}
    assert downsample([], []) == {"step": [], "loss": []}
    beside = downsample([1, 2, 3, 4], [4.0, 2.0, 1.0, 3.0], points=2, kl=[None, None, 0.5, 1.5], hidden=[None] * 4)
    assert beside == {"step": [2, 4], "loss": [3.0, 2.0], "kl": [None, 1.0]}
    with pytest.raises(ValueError, match="1 steps and 2 values"):
        downsample([1], [1.0, 2.0])


def test_prose_by_position_has_fields_of_its_own(tmp_path: Path) -> None:
    cell = {"task": "prose", "compression": 4, "n": 2, "positions": [0, 8], "nll": 3.0, "nll_low": 2.9, "nll_high": 3.1}
    outcome = {"task": "prose", "id": "w", "compression": 4, "positions": [0, 8], "nll": 3.0, "tokens": 7}
    schema.check(cell, schema.cell_spec)
    schema.check(outcome, schema.outcome_spec)
    for value, spec in ((cell, schema.cell_spec), (outcome, schema.outcome_spec)):
        answer = {name: item for name, item in value.items() if name != "positions"}
        with pytest.raises(ValueError, match="field 'exact' is missing"):  # of answers, which have no positions
            schema.check(answer, spec)
        with pytest.raises(ValueError, match=r"field 'positions\[1\]': expected a whole number"):
            schema.check(value | {"positions": [0, 2.5]}, spec)
        with pytest.raises(ValueError, match="field 'nll'"):
            schema.check({name: item for name, item in value.items() if name != "nll"}, spec)
