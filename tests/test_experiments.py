"""The committed tables are what records and table.yaml of their study say, and the README quotes them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lrsa.config import TableConf
from lrsa.results import Record
from lrsa.results.study import find_studies, read_study
from lrsa.table import build, plan

ROOT = Path(__file__).resolve().parents[1]
STUDIES = find_studies("all", ROOT / "experiments")
TABLES = sorted(path for folder in STUDIES for path in folder.glob("*.md") if path.name != "README.md")


@pytest.mark.filterwarnings("ignore::lrsa.results.join.TableWarning")  # of what a table itself names as missing
@pytest.mark.parametrize("study", STUDIES, ids=lambda folder: folder.name)
def test_a_study_is_rebuilt_byte_for_byte(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = {"experiment": study.name, "output": str(tmp_path), "figure": False}
    typed = {key: f"{key}={value}" for key, value in given.items()}
    for conf, rebuild in plan(TableConf(**given), given, typed):
        assert rebuild == f"lrsa-table experiment={study.name}"
        build(conf, rebuild)
    text = (".md", ".tex", ".csv")
    committed = {path.name for path in study.iterdir() if path.suffix in text and path.name != "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == committed
    for name in committed:
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes(), name


def test_the_command_rebuilds_tables_and_figures(tmp_path: Path) -> None:
    arguments = ["experiment=demo", f"output={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "lrsa.table", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    demo = ROOT / "experiments" / "demo"
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in demo.iterdir() if path.is_file() and path.name not in ("README.md", "table.yaml")
    }
    assert (tmp_path / "table.md").read_bytes() == (demo / "table.md").read_bytes()


def test_a_changed_record_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = Path("experiments/demo")
    shutil.copytree(ROOT / study, study)
    tables = read_study(study, {"experiment": "demo", "figure": False})
    build(tables["table"])
    before = (study / "table.md").read_text()
    record = Record.load(study / "records" / "lrsa-seed0")
    outcomes, cells = record.outcomes(), record.cells
    cell = next(cell for cell in cells if cell["compression"] == 4)
    flipped = next(row for row in outcomes if row["compression"] == 4 and row["exact"])
    flipped["exact"] = False
    cell["exact"] -= 1 / cell["n"]
    record.finish(record.metrics, cells, outcomes)
    build(tables["table"])
    changed = [pair for pair in zip(before.splitlines(), (study / "table.md").read_text().splitlines(), strict=True)]
    assert [old.split(" | ")[1] for old, new in changed if old != new] == ["LRSA 4x", "LRSA 4x"]  # value, difference


def test_every_study_has_its_tables_as_settings() -> None:
    assert {folder for folder in (ROOT / "experiments").iterdir() if (folder / "records").is_dir()} == set(STUDIES)
    for study in STUDIES:
        assert (study / "README.md").is_file()
        assert read_study(study)


def test_the_readme_quotes_the_tables() -> None:
    generated = {line for table in TABLES for line in table.read_text().splitlines()}
    quoted = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| [^|]*\|.*\d\.\d", line)]
    assert len(quoted) >= 5
    for line in quoted:
        assert line in generated, line
