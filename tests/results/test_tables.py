"""From records to a table: what is joined, what is refused, what is bold, what is written."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lrsa.results import build_table, cells_frame, load_records, outcomes_frame, plot_frame, rows_for_logging
from lrsa.results.figures import accuracy_figure, loss_figure, save_figure
from lrsa.results.formats import to_console, to_csv, to_latex, to_markdown, write_table
from lrsa.results.join import TableWarning
from lrsa.results.record import Record, RecordError
from lrsa.results.store import UnfinishedRecord

from .conftest import MakeRun, share

FAST = {"n_resamples": 1000}
DENSE = {("needles", None): share(0), ("needles", 1): share(100), ("needles", 4): share(40)}
LRSA = {("needles", None): share(0), ("needles", 1): share(100), ("needles", 4): share(80)}


def test_store_finds_runs_and_skips_the_unfinished(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", DENSE, folder="sweep/0-dense")
    make_run("lrsa", LRSA, folder="sweep/1-lrsa")
    start = {"command": "lrsa-train", "study": "synthetic", "arm": "killed", "seed": 0, "config": {}}
    Record.start(tmp_path / "runs/sweep/2-killed", **start)
    Record.start(tmp_path / "runs/sweep/3-failed", **start).fail(RuntimeError("boom\nmore"))
    with pytest.warns(UnfinishedRecord) as caught:
        records = load_records(tmp_path / "runs", tmp_path / "runs" / "sweep")  # each once
    assert [record.arm for record in records] == ["dense", "lrsa"]
    messages = sorted(str(item.message) for item in caught)
    assert "2-killed" in messages[0] and "unfinished" in messages[0]
    assert messages[1].endswith("failed with RuntimeError: boom")
    assert len(load_records(tmp_path / "runs", unfinished=True)) == 4


def test_no_records_says_what_to_do(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(RecordError, match=r"no finished records in .*0 record\.json found.*Run lrsa-train"):
        load_records(tmp_path)
    with pytest.raises(RecordError, match="there is no folder"):
        load_records(tmp_path / "nowhere")
    make_run("dense", DENSE)
    with pytest.raises(RecordError, match="no finished records of study 'other'"):
        load_records(tmp_path, study="other")


def test_frames(make_run: MakeRun) -> None:
    records = [make_run("dense", DENSE), make_run("lrsa", LRSA)]
    cells = cells_frame(records)
    assert list(cells["column"]) == ["floor", "full", "4x"] * 2
    assert cells["compression"].dtype == np.float64 and cells["compression"].isna().sum() == 2
    outcomes = outcomes_frame(records)
    assert len(outcomes) == 600
    assert outcomes.groupby(["arm", "column"])["exact"].mean()["lrsa", "4x"] == pytest.approx(0.8)


def test_table_values_differences_and_bold(make_run: MakeRun) -> None:
    table = build_table([make_run("dense", DENSE), make_run("lrsa", LRSA)], reference="dense", **FAST)
    assert [column.header for column in table.columns] == ["floor", "full", "4x (3.37x)"]
    dense, lrsa = table.rows
    assert [cell.interval.mean for cell in lrsa.cells if cell.interval] == [0.0, 1.0, 0.8]
    assert [cell.best for cell in lrsa.cells] == [False, False, True]  # neither the floor nor a tie
    assert not any(cell.best for cell in dense.cells)
    (gain,) = table.differences
    assert gain.arm == "lrsa" and gain.cells[2].interval is not None
    assert gain.cells[2].interval.mean == pytest.approx(0.4) and gain.cells[2].interval.excludes_zero
    assert gain.cells[1].interval is not None and not gain.cells[1].interval.excludes_zero


def test_gold_alone_is_a_column_of_its_own(make_run: MakeRun, tmp_path: Path) -> None:
    arms = [make_run("dense", {**DENSE, ("needles", "gold"): share(90)}), make_run("lrsa", LRSA)]
    table = build_table(arms, **FAST)
    assert [column.header for column in table.columns] == ["floor", "gold", "full", "4x (3.37x)"]
    dense, lrsa = table.rows
    assert [cell.interval and cell.interval.mean for cell in dense.cells] == [0.0, 0.9, 1.0, 0.4]
    assert lrsa.cells[1].interval is None and not dense.cells[1].best
    assert "with the gold documents alone" in to_markdown(table) and "gold" not in to_markdown(build_table(arms[1:]))
    assert [column.label for column in build_table(arms, compressions=[1, 4], **FAST).columns] == ["full", "4x"]
    frame = cells_frame(arms)
    assert list(frame["column"]) == ["floor", "full", "4x", "gold", "floor", "full", "4x"]
    assert list(frame["context"]) == ["none", "full", "full", "gold", "none", "full", "full"]
    labels = [text.get_text() for text in accuracy_figure(plot_frame(table)).legends[0].get_texts()]
    assert labels == ["dense", "lrsa", "without the context", "gold documents alone"]
    assert [row["compression"] for row in rows_for_logging(arms[0].cells)] == ["floor", "full", "4x", "gold"]


def test_differences_to_each_arms_own_full_cache(make_run: MakeRun) -> None:
    arms = [make_run("dense", DENSE), make_run("lrsa", {**LRSA, ("needles", 1): share(90)})]
    table = build_table(arms, reference="full", **FAST)
    assert [[cell.interval and round(cell.interval.mean, 6) for cell in row.cells] for row in table.differences] == [
        [-1.0, 0.0, -0.6],
        [-0.9, 0.0, -0.1],
    ]
    text = to_markdown(table)
    assert "**Difference to full, points**" in text and "| needles | lrsa | 100 | -90.0 [" in text
    full = make_run("full", DENSE)
    assert build_table([*arms, full], reference="full", **FAST).row_name(table.rows[0]) == "dense"
    assert [row.arm for row in build_table([*arms, full], reference="full", **FAST).differences] == ["dense", "lrsa"]
    with pytest.raises(RecordError, match="reference=full: no record holds the full column"):
        build_table(arms, reference="full", compressions=[4], **FAST)


def test_bold_needs_to_beat_every_arm(make_run: MakeRun) -> None:
    close = {("needles", 4): share(78)}
    records = [make_run("dense", DENSE), make_run("lrsa", LRSA), make_run("close", close)]
    table = build_table(records, **FAST)
    assert not any(cell.best for row in table.rows for cell in row.cells)
    assert "Bold" not in " ".join(table.notes)
    assert any(cell.best for row in build_table(records[:2], **FAST).rows for cell in row.cells)


def test_bold_of_a_metric_where_less_is_better(make_run: MakeRun) -> None:
    better, worse = make_run("better", DENSE), make_run("worse", DENSE)
    path = worse.folder
    rows = [row | {"nll": row["nll"] + 1} for row in worse.outcomes()]
    worse.finish(worse.metrics, worse.cells, rows)
    table = build_table([better, Record.load(path)], metric="nll", **FAST)
    assert [[cell.best for cell in row.cells] for row in table.rows] == [[False, True, True], [False, False, False]]
    assert table.difference_title == "difference to better, nats"
    with pytest.raises(ValueError, match=r"unknown metric 'bleu'; choose from exact, .*, f1, rouge_l, string_match"):
        build_table([better], metric="bleu")


def generated(record: Record, f1: float) -> Record:
    """The same run as if its answers had been generated, all with `f1`."""
    rows = [row | {"f1": f1, "exact_match": row["exact"], "text": "x"} for row in record.outcomes()]
    for row in rows:
        del row["nll"]
    marks = {"f1": f1, "f1_low": f1, "f1_high": f1, "exact_match": 0.0, "exact_match_low": 0, "exact_match_high": 1}
    cells = [cell | marks | {"exact_match": cell["exact"]} for cell in record.cells]
    for cell in cells:
        del cell["nll"]
    record.finish(record.metrics, cells, rows)
    return Record.load(record.folder)


def test_metrics_of_generated_answers(make_run: MakeRun) -> None:
    scored, one, two = (make_run(arm, DENSE) for arm in ("scored", "one", "two"))
    with pytest.raises(RecordError, match=r"no cell with f1 .*arms there: scored; only `lrsa-eval mode=generate`"):
        build_table([scored], metric="f1", **FAST)
    records = [scored, generated(one, 0.25), generated(two, 0.75)]
    table = build_table(records, arms=["scored", "one", "two"], reference="one", metric="f1", **FAST)
    text = to_markdown(table)
    assert "F1, %" in text and "| 25.0 [25.0, 25.0] |" in text and "+50.0" in text
    assert table.rows[0].cells[0].interval is None, "a scored run has no F1"
    assert table.rows[2].cells[1].best and not table.rows[2].cells[0].best
    assert "40.0" in to_markdown(build_table(records, metric="exact_match", **FAST))
    assert "missing" not in to_markdown(build_table(records, metric="exact", **FAST))
    with pytest.raises(RecordError, match="no cell with nll"):
        build_table(records[1:], metric="nll", **FAST)
    rows = rows_for_logging(records[0].cells) + rows_for_logging(records[1].cells)
    assert len({tuple(row) for row in rows}) == 1 and rows[0]["f1"] is None and rows[3]["f1"] == 25.0
    frame = outcomes_frame(records)
    assert list(frame["text"].dropna().unique()) == ["x"] and frame["nll"].isna().sum() == 600


def test_f1_that_contradicts_its_outcomes_is_refused(make_run: MakeRun) -> None:
    record = generated(make_run("one", DENSE), 0.25)
    value = json.loads(record.path.read_text())
    value["cells"][1]["f1"] = 0.5
    record.path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=r"needles at full says f1=0\.5, the outcomes .* average 0\.25"):
        build_table([Record.load(record.path)], metric="f1", **FAST)


def test_missing_cells_are_named(make_run: MakeRun) -> None:
    records = [make_run("dense", DENSE), make_run("lrsa", {("needles", 4): share(80), ("squad", 2): share(3)})]
    table = build_table(records, arms=["dense", "lrsa", "absent"], **FAST)
    text = to_markdown(table)
    by_arm = {(row.task, row.arm): [cell.interval is None for cell in row.cells] for row in table.rows}
    assert by_arm["needles", "lrsa"] == [True, True, True, False]  # floor, full, 2x, 4x
    assert by_arm["squad", "absent"] == [True] * 4
    assert text.count("missing") > 10 and "cells are missing: no finished record holds them" in text
    assert "missing" in to_csv(table) and r"\emph{missing}" in to_latex(table)


def test_seeds_are_joined(make_run: MakeRun) -> None:
    records = [make_run("dense", {("needles", 4): share(k)}, seed=s) for s, k in enumerate((30, 40, 50))]
    records += [make_run("lrsa", {("needles", 4): share(80)}, seed=s) for s in range(2)]
    table = build_table(records, **FAST)
    dense = table.rows[0].cells[0].interval
    assert dense is not None and dense.mean == pytest.approx(0.4) and (dense.seeds, dense.n) == (3, 100)
    assert table.rows[0].size == "100 × 3 seeds" and table.rows[1].size == "100 × 2 seeds"
    assert "100 × 3 seeds" in to_markdown(table) and r"100$\times$3 seeds" in to_latex(table)


def test_rows_with_unequal_n_say_it_in_every_cell(make_run: MakeRun) -> None:
    record = make_run("dense", {("needles", 1): share(50), ("needles", 4): share(30, 60)})
    text = to_markdown(build_table([record], **FAST))
    assert "| see cells |" in text and "n=100" in text and "n=60" in text


def test_arms_scored_on_other_examples_are_refused(make_run: MakeRun) -> None:
    records = [make_run("dense", {("needles", 4): share(40)}), make_run("lrsa", {("needles", 4): share(40, 60)})]
    with pytest.raises(ValueError, match=r"needles at 4x: lrsa and dense .*different examples \(60 and 100\)"):
        build_table(records, **FAST)


@pytest.mark.filterwarnings("ignore::lrsa.results.join.TableWarning")
def test_other_prompts_are_told(make_run: MakeRun) -> None:
    records = [make_run("dense", DENSE), make_run("lrsa", LRSA, fingerprint="other")]
    with pytest.warns(TableWarning, match="prompts of needles at 4x were not the same"):
        table = build_table(records, **FAST)
    assert any("2 data fingerprints" in note for note in table.notes)


def test_arms_tested_at_different_budgets_are_told(make_run: MakeRun) -> None:
    uniform = {"scorer": "lag_relative", "budget": "uniform", "dense_layers": []}
    spared = {"scorer": "lag_relative", "budget": "concentrated", "dense_layers": [7, 3]}
    records = [
        make_run("lrsa", LRSA, attention=spared),
        make_run("dense", DENSE, attention=uniform),
        make_run("older", DENSE, attention={"scorer": "lag_relative"}),  # than budgets
    ]
    options = {"arms": ["dense", "lrsa", "older"], "names": {"lrsa": "LRSA, spared"}, **FAST}
    (note,) = [note for note in build_table(records, **options).notes if "budget" in note]
    assert note == ("Tested at different budgets. Uniform: dense; older. Concentrated on layers 7, 3: LRSA, spared.")
    for alike in (
        build_table(records[1:], **FAST),
        build_table(records, compressions=[1], **FAST),  # which is full attention, whatever the budget
        build_table(records, arms=["lrsa"], **FAST),
    ):
        assert not any("budget" in note for note in alike.notes)
    other = make_run("other", LRSA, attention={**spared, "dense_layers": [3, 7]})
    assert any("layers 3, 7: other." in note for note in build_table([records[0], other], **FAST).notes)


def test_a_column_of_one_budget_has_no_note_whatever_other_tasks_were_tested_at(make_run: MakeRun) -> None:
    spared = {"scorer": "lag_relative", "budget": "concentrated", "dense_layers": [1]}
    uniform = {"scorer": "lag_relative", "budget": "uniform", "dense_layers": [0]}
    other = {("recall", 4): share(60)}
    one, two = make_run("dense", DENSE, attention=spared), make_run("dense", other, folder="b", attention=uniform)
    assert not any("budget" in note for note in build_table([one, two], **FAST).notes)
    three = make_run("lrsa", other, attention=spared)
    (note,) = [note for note in build_table([one, two, three], **FAST).notes if "budget" in note]
    assert note.endswith("Uniform, layer 0 dense: dense. Concentrated on layer 1: dense; lrsa.")


def test_two_experiments_cannot_give_one_cell(make_run: MakeRun) -> None:
    first, again = make_run("dense", DENSE, folder="a"), make_run("dense", DENSE, folder="b")
    with pytest.warns(TableWarning, match="measured twice, .*b/record.json"):
        assert len(build_table([first, again], **FAST).rows) == 1
    other = make_run("dense", DENSE, folder="c", knob=1)
    with pytest.raises(RecordError, match=r"different experiments, and both give arm 'dense', seed 0"):
        build_table([first, other], **FAST)


def test_cells_that_contradict_their_outcomes_are_refused(make_run: MakeRun) -> None:
    record = make_run("dense", DENSE)
    value = json.loads(record.path.read_text())
    value["cells"][2]["exact"] = 0.9
    record.path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=r"needles at 4x says exact=0\.9, the outcomes .* average 0\.4"):
        build_table([Record.load(record.path)], **FAST)
    value["cells"][2]["n"] = 99
    record.path.write_text(json.dumps(value))
    with pytest.raises(RecordError, match=r"says n=99, outcomes\.jsonl\.gz holds 100"):
        build_table([Record.load(record.path)], **FAST)


def test_each_arm_may_have_its_own_reference(make_run: MakeRun) -> None:
    records = [make_run("a", LRSA), make_run("dense_a", DENSE), make_run("b", DENSE), make_run("dense_b", DENSE)]
    pairs = {"a": "dense_a", "b": "dense_b"}
    names = {"a": "A", "dense_a": "Dense under A"}
    table = build_table(records, reference=pairs, names=names, **FAST)
    assert {(row.arm, row.reference) for row in table.differences} == set(pairs.items())
    single = build_table(records[:2], reference="dense_a", **FAST)
    assert [row.cells for row in table.differences if row.arm == "a"] == [row.cells for row in single.differences]
    assert "| A − Dense under A |" in to_markdown(table) and "A $-$ Dense under A" in to_latex(table)
    assert "Difference, points" in to_markdown(table)
    with pytest.raises(ValueError, match="reference arm 'dense_c' is not among"):
        build_table(records, reference={"a": "dense_c"}, **FAST)


def test_columns_can_be_chosen(make_run: MakeRun) -> None:
    table = build_table([make_run("dense", DENSE), make_run("lrsa", LRSA)], compressions=[4.0], **FAST)
    assert [column.header for column in table.columns] == ["4x (3.37x)"]
    assert all(len(row.cells) == 1 for row in (*table.rows, *table.differences))


def test_unknown_reference_and_empty_selection(make_run: MakeRun) -> None:
    record = make_run("dense", DENSE)
    with pytest.raises(ValueError, match="reference arm 'x' is not among the table's arms: dense"):
        build_table([record], reference="x", **FAST)
    with pytest.raises(RecordError, match="no cell of the arms and tasks asked for; arms there: dense"):
        build_table([record], arms=["x"], **FAST)


def test_text_is_the_same_bytes_and_names_its_command(tmp_path: Path, make_run: MakeRun) -> None:
    make_run("dense", DENSE), make_run("lrsa", LRSA)
    options = {"rebuild": "lrsa-table study=x", "names": {"lrsa": "LRSA_4x & more", "needles": "24 needles"}, **FAST}
    for name in ("one", "two"):
        write_table(build_table(load_records(tmp_path / "runs"), **options), tmp_path / name)
    for suffix in ("md", "tex", "csv"):
        one, two = ((tmp_path / name / f"table.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert b"lrsa-table study=x" in one.splitlines()[0]
    markdown = (tmp_path / "one" / "table.md").read_text()
    assert "| 24 needles | LRSA_4x & more | 100 | 0.0 [0.0, 3.7] |" in markdown
    assert "| **80.0** [" in markdown
    latex = (tmp_path / "one" / "table.tex").read_text()
    assert r"LRSA\_4x \& more" in latex and r"$\mathbf{80.0}_{-" in latex and latex.count(r"\toprule") == 1
    frame = pd.read_csv(tmp_path / "one" / "table.csv", comment="#")
    gain = frame[(frame["kind"] == "difference") & (frame["column"] == "4x")].iloc[0]
    assert (gain["arm"], gain["reference"], gain["n"]) == ("lrsa", "dense", 100)
    assert float(gain["mean"]) == pytest.approx(0.4)


def test_a_changed_record_changes_the_table(tmp_path: Path, make_run: MakeRun) -> None:
    before = to_markdown(build_table([make_run("dense", DENSE, folder="a")], **FAST))
    after = to_markdown(build_table([make_run("dense", DENSE | {("needles", 4): share(41)}, folder="b")], **FAST))
    assert before != after


def test_unknown_format(tmp_path: Path, make_run: MakeRun) -> None:
    table = build_table([make_run("dense", DENSE)], **FAST)
    with pytest.raises(ValueError, match="unknown table format html; choose from markdown, latex, csv"):
        write_table(table, tmp_path, ["html"])


def test_console_fits_80_columns_and_cuts_no_number(make_run: MakeRun) -> None:
    many = {("needles", c): share(k) for c, k in {None: 0, 1: 100, 2: 77, 4: 63, 8: 41}.items()}
    less = {key: share(max(0, int(value.sum()) - 30)) for key, value in many.items()}
    out = io.StringIO()
    table = build_table([make_run("dense", less), make_run("lrsa_mixed", many)], **FAST)
    Console(file=out, width=80).print(to_console(table))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "+30.0" in text and "needles: exact match, %" in text


def test_rows_for_logging_have_the_same_keys(make_run: MakeRun) -> None:
    rows = rows_for_logging(make_run("dense", DENSE).cells)
    assert [row["compression"] for row in rows] == ["floor", "full", "4x"]
    assert rows[2]["exact_match"] == pytest.approx(40.0)
    assert len({tuple(row) for row in rows}) == 1


def test_figures_are_the_same_bytes_with_embedded_fonts(tmp_path: Path, make_run: MakeRun) -> None:
    squad = {("squad", c): share(k) for c, k in {None: 5, 1: 30, 4: 18}.items()}
    records = [make_run("dense", DENSE | squad, loss=True), make_run("lrsa", LRSA | squad, loss=True)]
    table = build_table(records, names={"lrsa": "LRSA 4x"}, **FAST)
    for name in ("one", "two"):
        save_figure(accuracy_figure(plot_frame(table)), tmp_path / name, "accuracy")
        save_figure(loss_figure(records, table.names), tmp_path / name, "loss")
    for file in ("accuracy.pdf", "accuracy.png", "loss.pdf", "loss.png"):
        one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two, file
    assert b"/FontFile2" in (tmp_path / "one" / "accuracy.pdf").read_bytes()
    figure = accuracy_figure(plot_frame(table))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["needles", "squad"]
    line = figure.axes[0].get_lines()[2]  # dense: its line and its floor, then LRSA
    assert line.get_label() == "LRSA 4x"
    assert list(line.get_xdata()) == [1.0, 3.37] and list(line.get_ydata()) == pytest.approx([100.0, 80.0])


def test_figure_of_one_run_and_of_unjoined_seeds(make_run: MakeRun) -> None:
    one, two = make_run("dense", DENSE), make_run("dense", DENSE, seed=1)
    assert len(accuracy_figure(cells_frame([one])).axes) == 1
    with pytest.raises(ValueError, match="several values for needles at floor; join the seeds first"):
        accuracy_figure(cells_frame([one, two]))
    with pytest.raises(ValueError, match="no record holds a loss curve"):
        loss_figure([one])
