"""The Parquet store: what it holds, that it follows the record files, and how soon it answers."""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lrsa.config import TableConf
from lrsa.results import Record, RecordError, build_table, gathered, load_records
from lrsa.results.formats import to_csv
from lrsa.results.gathered import gather
from lrsa.results.pivot import Pivot
from lrsa.results.retention import build_retention
from lrsa.results.where import Where
from lrsa.table import build

from .conftest import MakeRun, share
from .many import write_many

FAST: dict[str, Any] = {"n_resamples": 200}
DENSE = {("needles", None): share(0), ("needles", 1): share(100), ("needles", 4): share(40)}


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{name}.parquet")


def test_a_table_from_the_store_is_that_of_the_files(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in (0, 1):
        make_run("dense", DENSE, seed=seed)
        make_run("lrsa", {**DENSE, ("needles", 4): share(70 + seed), ("needles", "gold"): share(90)}, seed=seed)
    runs, store = tmp_path / "runs", tmp_path / "store"
    stored = gather([runs], store).records
    for metric in ("exact", "nll"):
        assert to_csv(build_table(stored, metric=metric, **FAST)) == to_csv(
            build_table(load_records(runs), metric=metric, **FAST)
        )
    assert to_csv(build_retention(stored, **FAST)) == to_csv(build_retention(load_records(runs), **FAST))
    assert [record.to_dict() for record in stored] == [record.to_dict() for record in load_records(runs)]


def test_the_files_are_flat_tables(tmp_path: Path, make_run: MakeRun) -> None:
    record = make_run("dense", DENSE)
    record.config |= {"attention": {"lag_size": 128, "top_k": None, "dense_layers": [0, 1]}, "mixed": {"of": 3}}
    record.write()
    other = make_run("lrsa", DENSE, seed=1)
    other.config |= {"mixed": {"of": "text"}}
    other.write()
    gather([tmp_path / "runs"], tmp_path / "store")
    cells = read(tmp_path / "store", "cells")
    assert list(cells["column"]) == ["floor", "full", "4x"] * 2 and set(cells["arm"]) == {"dense", "lrsa"}
    assert cells["attention.lag_size"].max() == 128 and cells["attention.dense_layers"].iloc[0] == "[0, 1]"
    assert set(cells["mixed.of"]) == {"3", '"text"'}, "a key of several kinds is JSON"
    outcomes = read(tmp_path / "store", "outcomes")
    assert len(outcomes) == 600 and outcomes["exact"].dtype == bool
    assert outcomes[(outcomes["arm"] == "dense") & (outcomes["column"] == "4x")]["exact"].mean() == pytest.approx(0.4)


def test_it_follows_the_record_files(tmp_path: Path, make_run: MakeRun) -> None:
    runs, store = tmp_path / "runs", tmp_path / "store"
    dense = make_run("dense", DENSE)
    make_run("lrsa", DENSE)
    assert gather([runs], store).read == 2 and gather([runs], store).read == 0
    # a changed record, a new one, one that is gone, and one that is still running
    value = json.loads(dense.path.read_text())
    dense.finish(value["metrics"], [{**cell, "nll": 1.0} for cell in value["cells"]], dense.outcomes())
    make_run("third", DENSE)
    for file in (runs / "lrsa-seed0").iterdir():
        file.unlink()
    Record.start(runs / "running", command="lrsa-train", study="s", arm="running", seed=0, config={})
    found = gather([runs], store)
    assert found.read == 3
    assert [record.arm for record in found.records] == ["dense", "running", "third"]
    assert set(read(store, "cells")["arm"]) == {"dense", "third"}
    assert read(store, "cells").query("arm == 'dense'")["nll"].eq(1.0).all()
    assert len(read(store, "outcomes")) == 600
    table = build_table([record for record in found.records if record.status == "finished"], **FAST)
    assert to_csv(table) == to_csv(
        build_table([Record.load(runs / name) for name in ("dense-seed0", "third-seed0")], **FAST)
    )


def test_a_damaged_store_is_made_again_and_a_damaged_record_named(tmp_path: Path, make_run: MakeRun) -> None:
    runs, store = tmp_path / "runs", tmp_path / "store"
    record = make_run("dense", DENSE)
    gather([runs], store)
    for name in ("records", "cells", "outcomes"):
        file = store / f"{name}.parquet"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert gather([runs], store).read == 1 and gather([runs], store).read == 0
    other = tmp_path / "other"
    gather([runs], other)
    os.replace(other / "cells.parquet", store / "cells.parquet")  # of another writing
    assert gather([runs], store).read == 1
    rows = record.outcomes()
    record.finish(record.metrics, record.cells, [*rows, rows[0]])
    with pytest.raises(RecordError, match="example 'needles-0' of needles at floor is there twice"):
        gather([runs], store)
    with pytest.raises(RecordError, match="there is no folder"):
        gather([tmp_path / "nowhere"], store)


def test_two_writers_at_once_are_noticed(tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("dense", DENSE)
    gather([tmp_path / "runs"], tmp_path / "other")
    write = gathered._write

    def beside(store: Path, entries: Any) -> None:
        write(store, entries)
        os.replace(tmp_path / "other" / "cells.parquet", store / "cells.parquet")

    monkeypatch.setattr(gathered, "_write", beside)
    with pytest.raises(RecordError, match="another process wrote the store at the same time; run the command again"):
        gather([tmp_path / "runs"], tmp_path / "store")


def test_the_command_gathers_and_answers(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", DENSE)
    options = {"records": [str(tmp_path / "runs")], "output": str(tmp_path / "out"), "figure": False, "bootstrap": 100}
    made = build(TableConf(store=str(tmp_path / "store"), **options))
    assert made.said.endswith("1 records, 1 of them read anew") and made.table is not None
    assert "one resampling of examples that all cells share" in " ".join(made.table.notes)
    each = build(TableConf(store=str(tmp_path / "store"), draws="each", **options)).table
    assert each is not None and to_csv(each) == to_csv(build(TableConf(**options)).table)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown draws 'all'; choose from each, shared"):
        build(TableConf(draws="all", **options))


def answers(folder: Path, store: Path) -> dict[str, float]:
    """Processor seconds, reading included, of tables of every kind."""
    grid = Pivot(("attention.lag_size",), ("attention.top_k",))
    questions: dict[str, Any] = {
        "all": lambda records: build_table(records, draws="shared"),
        "likelihood": lambda records: build_table(records, draws="shared", metric="nll"),
        "grid": lambda records: build_table(
            records, draws="shared", pivot=grid, where=Where.parse("compression == 4")
        ),
        "chosen": lambda records: build_table(records, where=Where.parse("attention.lag_size == 64 and seed < 2")),
        "retention": lambda records: build_retention(records, draws="shared"),
    }  # fmt: skip
    taken = {}
    for name, ask in questions.items():
        gc.collect()
        begun = time.process_time()
        ask(gather([folder], store).records)
        taken[name] = time.process_time() - begun
    return taken


def test_200_jobs_answer_within_two_seconds(tmp_path: Path) -> None:
    """Processor time, since others may share the machine; the first call gathers."""
    write_many(tmp_path / "runs", {"needles": 40}, jobs=200, seeds=2, columns=4)
    assert gather([tmp_path / "runs"], tmp_path / "store").read == 200
    assert max(answers(tmp_path / "runs", tmp_path / "store").values()) < 2


@pytest.mark.slow
def test_200_jobs_of_three_tasks_answer_soon(tmp_path: Path) -> None:
    """1,440,000 outcomes: 50 settings of four seeds, three tasks at six compressions, so 900 cells and differences."""
    write_many(tmp_path / "runs", {"needles": 300, "xquad": 600, "hotpotqa": 300}, jobs=200, seeds=4)
    gather([tmp_path / "runs"], tmp_path / "store")
    taken = answers(tmp_path / "runs", tmp_path / "store")
    assert max(taken.values()) < 4, taken  # 2 on a core of one's own
