"""`lrsa-table` from any folder: what it writes, prints, and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrsa.config import TableConf
from lrsa.table import build

from .conftest import MakeRun, share


def lrsa_table(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "80"}
    command = [sys.executable, "-m", "lrsa.table", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_command_writes_prints_and_leaves_nothing_else(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", {("needles", 4): share(40)}, loss=True)
    make_run("lrsa", {("needles", 4): share(80)}, loss=True)
    arguments = [f"records=[{tmp_path}/runs]", "output=out", "arms=[dense,lrsa]", "names={lrsa: LRSA 4x}"]
    done = lrsa_table(tmp_path, *arguments, "bootstrap=500")
    assert done.returncode == 0, done.stderr
    assert "LRSA 4x" in done.stdout and "wrote out/table.md" in done.stdout
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    figures = ["accuracy.pdf", "accuracy.png", "loss.pdf", "loss.png"]  # all that these records have the data for
    assert written == [*figures, "table.csv", "table.md", "table.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]  # no run folder of Hydra's
    # paths below the folder of the call are written relative to it, so the command works elsewhere
    first = (tmp_path / "out" / "table.md").read_text().splitlines()[0]
    assert "lrsa-table 'records=[runs]' output=out" in first and str(tmp_path) not in first


def test_command_without_records_says_so_without_a_traceback(tmp_path: Path) -> None:
    done = lrsa_table(tmp_path, "study=absent")
    assert done.returncode == 1
    assert "error: there is no folder experiments/absent/records" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_defaults_follow_the_study(tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("dense", {("needles", 4): share(40)})
    (tmp_path / "experiments/synthetic").mkdir(parents=True)
    (tmp_path / "runs").rename(tmp_path / "experiments/synthetic/records")
    monkeypatch.chdir(tmp_path)
    table, written = build(TableConf(study="synthetic", figure=False, bootstrap=100))
    assert [str(path) for path in written] == [
        f"experiments/synthetic/table.{suffix}" for suffix in ("md", "tex", "csv")
    ]
    assert len(table.rows) == 1 and table.differences == ()


def test_neither_records_nor_study() -> None:
    with pytest.raises(ValueError, match="name the records to read"):
        build(TableConf())
    with pytest.raises(ValueError, match="names='x' is not a mapping"):
        build(TableConf(records=["."], names="x"))
