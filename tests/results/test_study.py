"""A study's table.yaml: what it says, what a call adds, and what it cannot say."""

from pathlib import Path

import pytest

from lrsa.results.join import TableWarning
from lrsa.results.produce import make_table
from lrsa.results.store import load_records
from lrsa.results.study import find_studies, read_study, rebuilt_by

from .conftest import MakeRun, share


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    return folder


def write(study: Path, text: str) -> None:
    (study / "table.yaml").write_text(text)


def test_tables_share_what_is_common(study: Path) -> None:
    write(study, "title: T\nbootstrap: 50\ntables:\n  table: {}\n  kept:\n    retention: own\n    title: K\n")
    tables = read_study(study)
    assert [(stem, conf.title, conf.retention, conf.bootstrap) for stem, conf in tables.items()] == [
        ("table", "T", None, 50),
        ("kept", "K", "own", 50),
    ]
    assert tables["kept"].records == [str(study / "records")] and tables["kept"].output == str(study)


def test_seeds_are_those_of_a_tables_own_arms(study: Path) -> None:
    lines = [
        "arms: [none, dense, lrsa]",
        "seeds: {none: [0], dense: [0, 1], lrsa: [0, 1]}",
        "tables: {all: null, two: {arms: [dense, lrsa]}, one: {arms: [lrsa], seeds: {lrsa: [0]}}, some: {seeds: [0]}}",
    ]
    write(study, chr(10).join(lines))
    seeds = {stem: conf.seeds for stem, conf in read_study(study).items()}
    two = {"dense": [0, 1], "lrsa": [0, 1]}
    assert seeds == {"all": {"none": [0], **two}, "two": two, "one": {"lrsa": [0]}, "some": [0]}


def test_records_stand_relative_to_the_file(study: Path) -> None:
    write(study, "records: [../other/records, records]\n")
    assert read_study(study)["table"].records == [str(study.parent / "other/records"), str(study / "records")]
    assert read_study(study, {"records": ["runs"]})["table"].records == ["runs"], "those of a call, to where it runs"


def test_what_a_call_says_wins_and_never_replaces_the_studys_files(study: Path) -> None:
    write(study, "title: T\nnames: {a: A}\ntables: {table: {}, kept: {retention: own}}\n")
    quiet = read_study(study, {"experiment": "one", "figure": False, "formats": ["csv"]})
    assert [conf.output for conf in quiet.values()] == [str(study)] * 2
    (likelihood,) = read_study(study, {"experiment": "one", "metric": "nll", "names": {"b": "B"}}).values()
    assert (likelihood.metric, likelihood.retention, likelihood.names) == ("nll", None, {"a": "A", "b": "B"})
    assert likelihood.output == "tables/one"
    assert [conf.output for conf in read_study(study, {"experiment": "all", "output": "x"}).values()] == ["x/one"] * 2
    typed = {"experiment": "experiment=all", "output": "output=x", "metric": "metric=nll"}
    assert rebuilt_by("one", typed) == ["lrsa-table", "experiment=one", "metric=nll"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrics: exact", "table.yaml: Key 'metrics' not in 'TableConf'"),
        ("bootstrap: many", "table.yaml: Value 'many'.*Integer"),
        ("output: elsewhere", "table.yaml: output: of the command line"),
        ("tables: [table]", "table.yaml: tables=.*expected a mapping"),
        ("tables: {one: 3}", "table.yaml: tables.one=3: expected a mapping"),
        ("[1, 2]", "table.yaml: expected a mapping"),
        ("a: [", "table.yaml: "),
    ],
)
def test_a_wrong_file_is_named(study: Path, text: str, message: str) -> None:
    write(study, text)
    with pytest.raises(ValueError, match=message):
        read_study(study)


def test_studies_are_found_by_name(study: Path) -> None:
    root = study.parent
    with pytest.raises(ValueError, match=r"experiment=all: there is no .*\(here: none\)"):
        find_studies("all", root)
    write(study, "title: T")
    assert find_studies("all", root) == find_studies("one", root) == [study]
    with pytest.raises(ValueError, match=r"experiment=two: .*\(here: one\).*records=\[FOLDER\]"):
        find_studies("two", root)


def test_what_is_expected_and_missing_is_named(study: Path, tmp_path: Path, make_run: MakeRun) -> None:
    cells = {("needles", 1): share(90), ("needles", 4): share(40)}
    for seed in (0, 1):
        make_run("dense", cells, seed=seed)
    make_run("lrsa", {("needles", 4): share(70)})
    write(
        study, "arms: [dense, lrsa, absent]\nseeds: {dense: [0, 1, 2], lrsa: [0]}\nnames: {dense: Dense}\nbootstrap: 50"
    )
    conf = read_study(study)["table"]
    with pytest.warns(TableWarning) as caught:
        table = make_table(conf, load_records(tmp_path / "runs"))
    notes = [
        "Missing of Dense: seed 2; no finished record holds them.",
        "Missing of lrsa: seed 0 of needles at full; no finished record holds them.",
    ]
    assert (
        [str(item.message) for item in caught] == notes == [note for note in table.notes if note.startswith("Missing")]
    )
    assert "3 of 6 cells are missing: no finished record holds them." in table.notes
    rows = {row.arm: row for row in table.rows}
    assert [cell.absent for cell in rows["absent"].cells if cell.interval is None] == ["missing"] * 2
    assert rows["dense"].size == "100 × 2 seeds", "what is there is shown as what it is"
    conf.seeds = {"other": [0]}
    with pytest.raises(ValueError, match="seeds names the arm 'other', which is not among the table's: dense, lrsa"):
        make_table(conf, load_records(tmp_path / "runs"))
