"""Tables whose rows and columns are keys of the runs' configs: seeds joined, different experiments refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from lrsa.config import TableConf
from lrsa.results import Record, RecordError, build_table
from lrsa.results.formats import to_csv, to_latex, to_markdown
from lrsa.results.pivot import Pivot
from lrsa.results.retention import build_retention
from lrsa.results.where import Where
from lrsa.table import build

from .conftest import MakeRun, share

FAST: dict[str, Any] = {"n_resamples": 200}


@pytest.fixture
def grid(make_run: MakeRun) -> list[Record]:
    """Lag x top-K x seed; right at 4x as often as lag / 4 + top-K + seed says."""
    records = []
    for lag, top_k, seed in itertools.product((32, 64, 128), (None, 16), (0, 1)):
        right = lag // 4 + (top_k or 0) + seed
        arm = f"lag{lag}-{top_k}"
        record = make_run(arm, {("needles", 1): share(90), ("needles", 4): share(right)}, seed=seed)
        record.config["attention"] = {"lag_size": lag, "top_k": top_k, "dense_layers": []}
        record.write()
        records.append(record)
    return records


def means(table) -> list[list[float | None]]:
    return [[cell.interval and round(100 * cell.interval.mean, 6) for cell in row.cells] for row in table.rows]


def test_rows_by_config_keys(grid: list[Record]) -> None:
    pivot = Pivot(("attention.lag_size", "attention.top_k"))
    table = build_table(grid, pivot=pivot, compressions=[4], **FAST)
    assert [row.arm for row in table.rows] == ["32, null", "32, 16", "64, null", "64, 16", "128, null", "128, 16"]
    assert means(table) == [[8.5], [24.5], [16.5], [32.5], [32.5], [48.5]]
    assert table.rows[0].size == "100 × 2 seeds" and table.reference == "32, null"
    text = to_markdown(table)
    assert "| task | lag_size, top_k | n | 4x (3.37x) |" in text and "| needles | **128, 16**" not in text
    assert "Lag\\_size, top\\_k" in to_latex(table) and ',"128, 16",' in to_csv(table)


def test_the_rows_may_be_headed_otherwise(grid: list[Record]) -> None:
    table = build_table(grid, pivot=Pivot(rows_title="compressed by"), compressions=[4], **FAST)
    assert "| task | compressed by | n |" in to_markdown(table) and "Compressed by" in to_latex(table)
    assert Pivot(rows_title="compressed by").usual


def test_rows_and_columns_of_a_grid(grid: list[Record]) -> None:
    pivot = Pivot(("attention.lag_size",), ("attention.top_k",))
    table = build_table(grid, pivot=pivot, where=Where.parse("compression == 4"), reference="128", **FAST)
    assert [column.header for column in table.columns] == ["top_k null (3.37x)", "top_k 16 (3.37x)"]
    assert means(table) == [[8.5, 24.5], [16.5, 32.5], [32.5, 48.5]]
    assert [row.arm for row in table.differences] == ["32", "64"]
    assert [cell.best for cell in table.rows[2].cells] == [True, True], "clear of the others in each column"


def test_compression_may_be_a_row_and_stand_beside_a_key(grid: list[Record]) -> None:
    where = Where.parse("attention.top_k == 16 and seed == 0")
    rows = build_table(grid, pivot=Pivot(("compression",), ("attention.lag_size",)), where=where, **FAST)
    assert [row.arm for row in rows.rows] == ["full", "4x"] and means(rows) == [[90, 90, 90], [24, 32, 48]]
    both = build_table(
        grid, pivot=Pivot(("seed",), ("attention.lag_size", "compression")),
        where=Where.parse("attention.top_k == 16 and attention.lag_size > 32"), **FAST,
    )  # fmt: skip
    assert [column.label for column in both.columns] == [
        "lag_size 64, full",
        "lag_size 64, 4x",
        "lag_size 128, full",
        "lag_size 128, 4x",
    ]
    assert means(both) == [[90, 32, 90, 48], [90, 33, 90, 49]]


def test_different_experiments_in_one_cell_are_refused(grid: list[Record]) -> None:
    with pytest.raises(RecordError, match=r"row '\d+', column '4x' holds.*attention\.top_k \(.*\).*add one to rows"):
        build_table(grid, pivot=Pivot(("attention.lag_size",)), compressions=[4], **FAST)
    with pytest.raises(RecordError, match=r"differ in compression \(full and 4x\)"):
        build_table(grid, pivot=Pivot(("arm",), ("attention.lag_size",)), **FAST)


def test_unknown_and_impossible_keys(grid: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"no record has the key 'attention\.lag'; is it one of .*attention\.lag_size"):
        build_table(grid, pivot=Pivot(("attention.lag",)), **FAST)
    with pytest.raises(ValueError, match=r"no record has the key 'lag_size'; is it one of attention\.lag_size"):
        build_table(grid, where=Where.parse("lag_size == 3"), **FAST)
    with pytest.raises(ValueError, match=r"'attention' is a group of the config.*lag_size, top_k"):
        build_table(grid, where=Where.parse("attention == 3"), **FAST)
    for rows, columns in (([], ["compression"]), (["arm"], ["arm"]), (["task"], ["compression"])):
        with pytest.raises(ValueError, match="rows"):
            Pivot(tuple(rows), tuple(columns))
    with pytest.raises(ValueError, match="retention is of compressions"):
        build_retention(grid, pivot=Pivot(("arm",), ("attention.lag_size",)))


def test_nothing_left_says_of_what(grid: list[Record]) -> None:
    with pytest.raises(RecordError, match="hold no cell where seed == 9 of the arms and tasks asked for"):
        build_table(grid, where=Where.parse("seed == 9"), **FAST)


def test_the_command_pivots(grid: list[Record], tmp_path: Path) -> None:
    conf = TableConf(
        records=[str(tmp_path / "runs")], rows=["attention.lag_size"], columns=["attention.top_k"], bootstrap=100,
        where="compression == 4 and seed == 1", output=str(tmp_path / "out"), names={"32": "L 32"},
    )  # fmt: skip
    made = build(conf)
    assert [path.name for path in made.written] == ["table.md", "table.tex", "table.csv"]
    assert "| needles | L 32 | 100 | 9.0 [" in made.written[0].read_text()
