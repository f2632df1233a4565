"""`lrsa-table` from any folder: what it writes, prints, and refuses."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from lrsa.config import TableConf
from lrsa.table import build, main

from .conftest import MakeRun, share

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lrsa_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, in `tmp_path`: exit status, output, errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["lrsa-table", *arguments])
        GlobalHydra.instance().clear()
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


def test_command_writes_prints_and_leaves_nothing_else(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", {("needles", 4): share(40)}, loss=True)
    make_run("lrsa", {("needles", 4): share(80)}, loss=True)
    arguments = [f"records=[{tmp_path}/runs]", "output=out", "arms=[dense,lrsa]", "names={lrsa: LRSA 4x}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "80"}
    command = [sys.executable, "-m", "lrsa.table", *arguments, "bootstrap=500"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LRSA 4x" in done.stdout and "wrote out/table.md" in done.stdout
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    figures = ["accuracy.pdf", "accuracy.png", "loss.pdf", "loss.png"]  # all that these records have the data for
    assert written == [*figures, "table.csv", "table.md", "table.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]  # no run folder of Hydra's
    # paths below the folder of the call are written relative to it, so the command works elsewhere
    first = (tmp_path / "out" / "table.md").read_text().splitlines()[0]
    assert "lrsa-table 'records=[runs]' output=out" in first and str(tmp_path) not in first


def test_bad_input_is_said_without_a_traceback(tmp_path: Path, lrsa_table: Call) -> None:
    status, _, errors = lrsa_table("experiment=absent")
    assert status == 1
    assert "error: experiment=absent: there is no experiments/absent/table.yaml (here: none)" in unwrapped(errors)
    assert "Traceback" not in errors and not list(tmp_path.iterdir())


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_records_need_a_name() -> None:
    with pytest.raises(ValueError, match="name the records to read"):
        build(TableConf())
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        build(TableConf(records=["nowhere"]))


def test_names_references_and_seeds_are_what_they_should_be(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", {("needles", 4): share(40)})
    for wrong in ({"names": "x"}, {"reference": 3}, {"seeds": "0"}, {"seeds": [0.5]}, {"seeds": {"dense": 3}}):
        (key,) = wrong
        with pytest.raises(ValueError, match=f"{key}="):
            build(TableConf(records=[str(tmp_path / "runs")], output=str(tmp_path / "out"), **wrong))


def test_a_studys_command_reads_its_settings_and_takes_more(
    tmp_path: Path, make_run: MakeRun, lrsa_table: Call
) -> None:
    study = tmp_path / "experiments" / "synthetic"
    make_run("dense", {("needles", 1): share(90), ("needles", 4): share(40)})
    study.mkdir(parents=True)
    (tmp_path / "runs").rename(study / "records")
    (study / "table.yaml").write_text("names: {dense: Dense}\ntitle: A study\nfigure: false\nbootstrap: 100\n")
    status, _, errors = lrsa_table("experiment=synthetic", "names={needles: Needles}", "compressions=[4]")
    assert status == 0, errors
    assert not (study / "table.md").exists(), "another table than its own goes elsewhere"
    text = (tmp_path / "tables" / "synthetic" / "table.md").read_text()
    command = "lrsa-table experiment=synthetic 'names={needles: Needles}' 'compressions=[4]'"
    assert text.startswith(f"<!-- Generated, do not edit. Rebuild: {command} -->")
    assert "### A study" in text and "| Needles | Dense | 100 | 40.0 [" in text and "90.0" not in text


def test_one_broken_study_does_not_keep_the_others(tmp_path: Path, make_run: MakeRun, lrsa_table: Call) -> None:
    make_run("dense", {("needles", 4): share(40)})
    for name in ("a", "b"):
        (tmp_path / "experiments" / name).mkdir(parents=True)
        (tmp_path / "experiments" / name / "table.yaml").write_text(
            f"records: [../../{'nowhere' if name == 'a' else 'runs'}]\nfigure: false\nbootstrap: 100\n"
        )
    status, _, errors = lrsa_table("experiment=all", "output=out")
    assert status == 1 and "error: a, table: there is no folder nowhere" in unwrapped(errors)
    assert (tmp_path / "out" / "b" / "table.md").exists() and not (tmp_path / "out" / "a").exists()


def test_a_call_can_ask_for_any_table_and_keep_a_store(tmp_path: Path, make_run: MakeRun, lrsa_table: Call) -> None:
    for seed in (0, 1):
        make_run("dense", {("needles", 1): share(90), ("needles", 4): share(40)}, seed=seed, knob=3)
    asked = ["records=[runs]", "rows=[recipe.knob]", 'where="compression == 4 and seed < 1"', "store=store"]
    status, output, errors = lrsa_table(*asked, "bootstrap=100", "figure=false")
    assert status == 0, errors
    assert "store store: 2 records, 2 of them read anew" in output and "wrote tables/table.md" in output
    text = (tmp_path / "tables" / "table.md").read_text()
    assert "| task | knob | n | 4x (3.37x) |" in text and "| needles | 3 | 100 | 40.0 [" in text
    assert "2 records, 0 of them read anew" in lrsa_table(*asked, "bootstrap=100", "figure=false")[1]
    status, _, errors = lrsa_table("records=[runs]", "where=\"__import__('os')\"")
    assert status == 1 and "is not allowed" in unwrapped(errors)
