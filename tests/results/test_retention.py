"""The table of what is left of the full cache's gain: shares, what cannot be shared, what was kept; n everywhere."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lrsa.config import TableConf
from lrsa.results import Record
from lrsa.results.formats import to_console, to_csv, to_latex, to_markdown
from lrsa.results.record import RecordError
from lrsa.results.retention import build_retention
from lrsa.table import build

from .conftest import MakeRun, Outcomes, share

FAST = {"n_resamples": 500}


def outcomes(floor: int, full: int, half: int, n: int = 100) -> Outcomes:
    of = {("needles", None): floor, ("needles", 1): full, ("needles", 4): half}
    return {key: share(right, n) for key, right in of.items()}


@pytest.fixture
def arms(make_run: MakeRun) -> list[Record]:
    return [make_run("dense", outcomes(0, 80, 20)), make_run("lrsa", outcomes(20, 60, 50))]


def means(table) -> list[list[float | None]]:
    return [[cell.interval and round(cell.interval.mean, 6) for cell in row.cells] for row in table.rows]


def test_a_share_of_the_models_own_full_score(arms: list[Record]) -> None:
    table = build_retention(arms, **FAST)
    assert [column.label for column in table.columns] == ["4x"] and table.differences == ()
    assert means(table) == [[0.25], [0.75]]
    assert "the same model's full score" in " ".join(table.notes)


def test_a_share_of_the_references_full_score(arms: list[Record]) -> None:
    """Each with its own floor: (60 - 20) / (80 - 0) and (50 - 20) / (80 - 0)."""
    table = build_retention(arms, of="reference", reference="dense", **FAST)
    assert [column.label for column in table.columns] == ["full", "4x"]
    assert means(table) == [[1.0, 0.25], [0.5, 0.375]]
    full = table.rows[0].cells[0].interval
    assert full is not None and (full.low, full.high, full.method) == (1, 1, "definition")
    assert "Against: dense, that of dense; lrsa, that of dense." in table.notes
    assert means(build_retention(arms, of="reference", reference={"dense": "lrsa"}, **FAST))[0] == [2.0, 0.5]
    assert means(build_retention(arms, compressions=[4], **FAST)) == [[0.25], [0.75]]


def rendered(table) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=100).print(to_console(table))
    return [to_markdown(table), to_latex(table), to_csv(table), out.getvalue()]


def test_a_share_of_no_gain_is_said_to_be_unclear_with_its_n(make_run: MakeRun, arms: list[Record]) -> None:
    flat = make_run("flat", outcomes(50, 52, 51))
    table = build_retention([*arms, flat], **FAST)
    assert means(table)[1] == [None] and table.rows[1].size == "100"
    note = "Unclear, needles of flat: full - floor of flat is +2.0 [-1.9, +5.8] n=100, not clear of 0"
    assert any(text.startswith(note) for text in table.notes), table.notes
    for text in rendered(table):
        assert "unclear" in text and "missing" not in text
    lines = to_markdown(table).splitlines()
    assert "| needles | flat | 100 | unclear |" in lines
    frame = pd.read_csv(io.StringIO(to_csv(table)), comment="#")
    assert list(frame["n"]) == [100, 100, 100] and list(frame["metric"].unique()) == ["retention of exact"]


def test_every_share_is_printed_with_its_n(make_run: MakeRun, arms: list[Record]) -> None:
    """In its row, or in its cell where a row's cells differ; so are differences."""
    uneven = [
        make_run("uneven", {**outcomes(0, 80, 20), ("needles", 8): share(10)}),
        make_run("uneven", {**outcomes(0, 80, 20), ("squad", 4): share(20)}, seed=1),
    ]
    table = build_retention([*arms, *uneven], arms=["uneven"], **FAST)
    needles = table.rows[0]
    assert needles.size is None and [cell.interval and cell.interval.size for cell in needles.cells] == [
        "100 × 2 seeds",
        "100",
    ]
    assert means(table)[1] == [None, None], "squad has neither floor nor full"
    markdown, latex, _, console = rendered(table)
    assert "| see cells | 25.0 [" in markdown and markdown.count(" n=100") == 2
    assert latex.count("$n$=100") == 2 and console.count("n=100") == 2
    for text in rendered(build_retention(arms, **FAST)):
        assert "100" in text
    for text in rendered(build_retention([*arms, make_run("flat", outcomes(50, 52, 51, 90))], arms=["flat"], **FAST)):
        assert "90" in text and "unclear" in text


def test_what_was_kept_stands_beside_it(make_run: MakeRun) -> None:
    records = [make_run("dense", outcomes(0, 80, 20)), make_run("lrsa", outcomes(0, 60, 50))]
    for record, slots in zip(records, (1211, 1100), strict=True):
        sizes = {"slots": slots, "kv_bytes_per_layer": [slots * 1024] * 2}
        record.finish({}, [cell | sizes for cell in record.cells], record.outcomes())
    (note,) = [note for note in build_retention(records, **FAST).notes if note.startswith("Held")]
    assert note.endswith("bytes of the cache: 4x 1,100 to 1,211 slots, 2.15 to 2.37 MiB.")
    measured = {"cache_slots": 1000.0, "cache_bytes": 2.0**21}
    records[0].finish({}, [cell | measured for cell in records[0].cells], records[0].outcomes())
    (note,) = [note for note in build_retention(records[:1], **FAST).notes if note.startswith("Held")]
    assert note.endswith("4x 1,000 slots, 2 MiB."), "what a cache really held comes first"


def test_what_cannot_be_shared_is_refused(make_run: MakeRun, arms: list[Record]) -> None:
    with pytest.raises(ValueError, match="unknown retention 'dense'; choose from own, reference"):
        build_retention(arms, of="dense")
    no_floor = make_run("no_floor", {("needles", 1): share(80), ("needles", 4): share(40)})
    with pytest.raises(RecordError, match=r"the floor column, and no record holds it.*evaluation\.floor=true"):
        build_retention([no_floor])
    assert means(build_retention([*arms, no_floor], **FAST))[2] == [None]
    no_full = make_run("no_full", {("needles", None): share(0), ("needles", 4): share(40)})
    with pytest.raises(RecordError, match="the full column"):
        build_retention([no_full])
    only_full = make_run("only_full", {("needles", None): share(0), ("needles", 1): share(40)})
    with pytest.raises(RecordError, match="nothing compressed was measured"):
        build_retention([only_full])


def test_the_command_writes_a_file_of_its_own(tmp_path: Path, arms: list[Record]) -> None:
    options = {"records": [str(tmp_path / "runs")], "output": str(tmp_path / "out"), "bootstrap": 100}
    made = build(TableConf(retention="own", **options))
    table, written = made.table, made.written
    assert [path.name for path in written] == ["retention_own.md", "retention_own.tex", "retention_own.csv"]
    assert np.isclose(means(table), [[0.25], [0.75]]).all()
    made = build(TableConf(figure=False, **options))
    assert [path.name for path in made.written] == ["table.md", "table.tex", "table.csv"]
