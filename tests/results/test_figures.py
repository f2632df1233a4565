"""Figures show what records hold, arms look alike in all of them, and what has no data says so."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lrsa.config import TableConf
from lrsa.results import Record, bootstrap_mean, build_table
from lrsa.results.diffs import differences, short_names, told_apart
from lrsa.results.figures import (
    FIGURES,
    kept_figure,
    kept_html,
    kept_share,
    kept_text_figure,
    make_figures,
    save_figure,
)
from lrsa.results.figures.frames import held_frame
from lrsa.results.figures.lines import bytes_text, frontier
from lrsa.results.figures.retained import apart
from lrsa.results.figures.style import COLUMN_WIDTH, TEXT_WIDTH, add_caption, arm_styles
from lrsa.results.grids import MixedRuns, NothingToShow, grid_of_needles, grid_of_settings
from lrsa.results.pivot import COLUMNS, Pivot
from lrsa.results.store import load_records
from lrsa.results.where import Where
from lrsa.table import build

RATIOS = {1: 1.0, 2: 1.9, 4: 3.37, 8: 5.56}
FAST = {"n_resamples": 200}
N = 22  # two answers at each of eleven depths


def right(share: float) -> np.ndarray:
    return np.arange(N) < round(share * N)


@pytest.fixture
def run(tmp_path: Path):
    """A finished evaluation of one task: `scores` by compression (None: the floor), as right answers."""

    def make(arm, scores, *, task="needles", seed=0, lag=128, length=4096, scorer="lag_relative", loss=False) -> Record:
        name = f"{arm}-{task}-{seed}-{lag}-{length}-{scorer}"
        depths = [k / 10 for k in range(11)]
        config = {
            "run": {"arm": arm, "seed": seed, "output_dir": str(tmp_path / name)},
            "attention": {"lag_size": lag, "scorer": scorer},
            "evaluation": {
                "attention": {"lag_size": lag},
                "length": length,
                "tasks": {task: {"args": {"depths": depths}}},
            },
        }
        record = Record.start(tmp_path / name, command="lrsa-eval", study="s", arm=arm, seed=seed, config=config)
        cells, rows = [], []
        for compression, found in scores.items():
            interval = bootstrap_mean(found, 100)
            measured = None if compression is None else RATIOS[compression]
            size = {} if compression is None else {"kv_bytes_per_layer": [1e6 / measured] * 3, "length": float(length)}
            ends = {"exact": interval.mean, "exact_low": interval.low, "exact_high": interval.high}
            cell = {"task": task, "compression": compression, "n": N, "measured_ratio": measured, "slots": 10.0}
            cells.append({**cell, **ends, **size, "tokens_per_second": 100.0})
            rows += [
                {"task": task, "id": f"{task}-{k}", "compression": compression, "exact": bool(value), "tokens": 3,
                 "nll": 0.5, "depth": depths[k % 11] + 0.003 if compression else None}
                for k, value in enumerate(found)
            ]  # fmt: skip
        curve = {"loss_curve": {"step": list(range(1, 41)), "loss": list(np.linspace(2, 1, 40))}} if loss else None
        record.finish({}, cells, rows, curve)
        return record

    return make


@pytest.fixture
def study(run) -> list[Record]:
    few, many = {None: right(0.1), 1: right(1), 4: right(0.4)}, {None: right(0.1), 1: right(0.9), 4: right(0.8)}
    return [run("none", few), run("dense", few, loss=True), run("lrsa", many, loss=True)]


def arms_of(figure: Figure) -> dict[str, str]:
    """Colour of each arm's line, by its label in the legend."""
    lines = [line for axes in figure.axes for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): to_hex(line.get_color()) for line in lines}


def test_an_arm_looks_the_same_in_every_figure(study: list[Record], tmp_path: Path) -> None:
    table = build_table(study, arms=["none", "dense", "lrsa"], names={"lrsa": "LRSA 4x"}, **FAST)
    made = make_figures(study, table, {name: {} for name in ("accuracy", "pareto", "loss", "throughput")})
    colours = arms_of(made["accuracy"])
    assert list(colours) == ["none", "dense", "LRSA 4x"] and len(set(colours.values())) == 3
    for name, figure in made.items():
        shown = arms_of(figure)
        assert shown and all(colours[arm] == colour for arm, colour in shown.items()), name
    assert "none" not in arms_of(made["loss"]), "an arm without a curve takes no place and no colour"
    styles = arm_styles([f"arm {k}" for k in range(20)])
    assert len({(style.colour, style.marker) for style in styles.values()}) == 20


def test_what_there_is_data_for_is_drawn_and_saved_without_a_warning(study: list[Record], tmp_path: Path) -> None:
    table = build_table(study, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make_figures(study, table)
        for name, figure in made.items():
            assert [path.suffix for path in save_figure(figure, tmp_path / "out", name)] == [".pdf", ".png"]
    assert list(made) == ["accuracy", "pareto", "retention", "needle", "loss"]
    assert all(b"/FontFile2" in (tmp_path / "out" / f"{name}.pdf").read_bytes() for name in made)


def test_what_is_wanted_and_has_no_data_says_what_is_missing(study: list[Record], run) -> None:
    table = build_table(study, **FAST)
    for wanted, message in {
        "heat": "figure heat: evaluation.attention.lag_size is 128 in all runs",
        "position": "figure position: no prose was read by position: lrsa-eval mode=perplexity does",
        "picture": "unknown figure 'picture'; choose from accuracy, pareto",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_figures(study, table, [wanted])
    with pytest.raises(ValueError, match="figure heat has no option row; it has rows, columns, panels"):
        make_figures(study, table, {"heat": {"row": "x"}})
    alone = [run("alone", {4: right(0.5)}, seed=7)]
    for name in FIGURES:
        if name not in ("accuracy", "throughput", "needle"):
            with pytest.raises(NothingToShow, match=f"figure {name}: "):
                make_figures(alone, build_table(alone, **FAST), [name])


def test_the_caption_says_n_and_the_intervals(study: list[Record]) -> None:
    for name, figure in make_figures(study, build_table(study, **FAST)).items():
        (caption,) = [text.get_text().replace("\n", " ") for text in figure.texts]
        assert ("n: needles 22" in caption and "95% intervals over examples" in caption) or name in ("needle", "loss")


@pytest.mark.parametrize("width", [COLUMN_WIDTH, TEXT_WIDTH])
def test_a_caption_stays_on_its_figure(width: float) -> None:
    figure = Figure(figsize=(width, 2), layout="constrained")
    figure.subplots()
    add_caption(figure, "Means of WIDE WORDS, 95% intervals over examples and seeds; n = 1,190 × 3 seeds a field. " * 4)
    FigureCanvasAgg(figure).draw()
    (caption,) = figure.texts
    box, whole = caption.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0
    assert box.y1 < figure.axes[0].get_tightbbox().y0, "below the panel"


def test_the_frontier_is_what_nothing_beats_at_as_few_bytes() -> None:
    points = [(100, 10), (100, 30), (200, 25), (400, 50), (400.1, 60), (800, 60)]
    cells = pd.DataFrame(points, columns=["bytes_per_token", "mean"])
    assert frontier(cells)["mean"].tolist() == [30, 60]
    assert frontier(cells, higher=False)["mean"].tolist() == [10]
    assert [bytes_text(value) for value in (512, 4096, 1.5 * 2**20)] == ["512 B", "4 KiB", "1.5 MiB"]


def test_retention_is_that_of_the_table(study: list[Record]) -> None:
    figure = make_figures(study, build_table(study, **FAST), {"retention": {"bootstrap": 200}})["retention"]
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    assert lines["lrsa"].get_ydata()[0] == pytest.approx(100 * (18 - 2) / (20 - 2))


def test_what_is_retained_of_the_reference_by_bytes_kept(study: list[Record]) -> None:
    """The dense arm's full gain is 20 - 2 answers of 22; the full cache, all of the bytes, is a point too."""
    table = build_table(study, arms=["none", "dense", "lrsa"], reference="dense", names={"lrsa": "LRSA"}, **FAST)
    figure = make_figures(study, table, {"retained": {"bootstrap": 200}})["retained"]
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines() if len(line.get_xdata()) == 2}
    np.testing.assert_allclose(lines["LRSA"].get_xdata(), [1, 1 / RATIOS[4]])
    np.testing.assert_allclose(lines["LRSA"].get_ydata(), [100 * (20 - 2) / (22 - 2), 100 * (18 - 2) / (22 - 2)])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100%\nfull", "30%\n4×"]
    named = {text.get_text(): to_hex(text.get_color()) for text in axes.texts}
    assert set(named) == {"none", "dense", "LRSA"} and named["LRSA"] == to_hex(lines["LRSA"].get_color())
    (caption,) = figure.texts
    assert "(score - floor) / (dense's full - floor)" in caption.get_text().replace("\n", " ")
    own = make_figures(study, table, {"retained": {"of": "own", "bootstrap": 200}})["retained"]
    assert "the same model's full" in own.texts[0].get_text().replace("\n", " ")


def test_names_that_would_overlap_stand_apart() -> None:
    np.testing.assert_allclose(apart([0, 50, 100], 8), [0, 50, 100])
    np.testing.assert_allclose(apart([10, 10, 12, 90], 8), [10 + 2 / 3 - 8, 10 + 2 / 3, 10 + 2 / 3 + 8, 90])
    assert np.diff(apart([0, 7, 8, 9, 30, 31], 8)).min() >= 8 - 1e-9


def test_figures_are_of_the_cells_that_the_table_is_of(run, tmp_path: Path) -> None:
    """Two lengths of one study: the bytes held at 4,096 tokens are not averaged with those at 1,024."""
    scores = {None: right(0.1), 1: right(1), 4: right(0.5)}
    for length in (1024, 4096):
        for arm in ("dense", "lrsa"):
            run(arm, scores, length=length)
    conf = TableConf(records=[str(tmp_path)], where="evaluation.length == 4096", reference="dense", bootstrap=100)
    conf.figures, conf.output = ["retained", "retention", "pareto"], str(tmp_path / "out")
    conf.formats = ["markdown"]
    assert len(build(conf).written) == 1 + 2 * 3
    chosen = Where.parse(conf.where).of(load_records(tmp_path))
    held = held_frame(chosen, {}).query("column == 'full'")["bytes_per_token"]
    assert held.tolist() == pytest.approx([3e6 / 4096] * 2)


def test_a_pivoted_table_has_the_figures_of_its_runs(run) -> None:
    """Two knobs of a sweep as rows: no row is an arm, and the runs differ in both."""
    scores = {1: right(1), 4: right(0.5)}
    runs = [run(f"lag{lag}-{top}", scores, lag=lag, loss=True) for lag in (32, 64) for top in (1, 2)]
    for number, record in enumerate(runs):
        record.config["attention"]["top_k"] = 1 + number % 2
    table = build_table(runs, **FAST, pivot=Pivot(("attention.lag_size", "attention.top_k"), COLUMNS))
    made = make_figures(runs, table)
    assert {"accuracy", "heat", "loss"} <= set(made)


def test_a_heat_map_holds_the_means_of_its_fields(run) -> None:
    scores = {32: 0.2, 64: 0.5, 1024: 0.8}
    runs = [
        run(f"lrsa_{lag}", {1: right(1), 4: right(share)}, lag=lag, seed=seed)
        for lag, share in scores.items()
        for seed in (0, 1)
    ]
    (panel,) = grid_of_settings(runs, n_resamples=100).panels
    assert (panel.rows, panel.columns) == (("32", "64", "1024"), ("full", "4x"))
    np.testing.assert_allclose(panel.means[:, 1], [100 * right(share).mean() for share in scores.values()])
    assert panel.intervals[0, 1].size == f"{N} × 2 seeds"
    figure = make_figures(runs, build_table(runs, **FAST), ["heat"])["heat"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "100.0" and len(texts) == 12
    other = run("snapkv_32", {1: right(1), 4: right(0.1)}, lag=32, scorer="snapkv")
    with pytest.raises(MixedRuns, match=r"seeds 0, 1, 0 differ in attention\.scorer; name it as panels="):
        grid_of_settings([*runs, other])
    both = make_figures([*runs, other], build_table([*runs, other], **FAST))["heat"]
    assert [axes.get_title(loc="left") for axes in both.axes[:2]] == [
        "needles · scorer lag_relative",
        "needles · scorer snapkv",
    ]
    by_scorer = grid_of_settings([*runs, other], panels="attention.scorer", n_resamples=100)
    assert [panel.title for panel in by_scorer.panels] == [
        ("needles", "scorer lag_relative"),
        ("needles", "scorer snapkv"),
    ]
    assert np.isnan(by_scorer.panels[1].means[1:]).all(), "what was not measured is no number"


def test_needles_stand_at_their_depth_and_length(run) -> None:
    late = np.arange(N) % 11 >= 5  # answers in the later half are found
    runs = [run("lrsa", {1: right(1), 4: late}, length=length) for length in (1024, 4096)]
    full, four = grid_of_needles(runs).panels
    assert full.title == ("needles", "lrsa", "full") and four.columns == ("1k", "4k")
    assert four.rows == tuple(str(10 * k) for k in range(11))
    assert (full.means == 100).all() and (four.counts == 2).all()
    np.testing.assert_array_equal(four.means, np.repeat(100.0 * (np.arange(11) >= 5)[:, None], 2, axis=1))
    with pytest.raises(NothingToShow, match="no outcome with f1 says its depth"):
        grid_of_needles(runs, metric="f1")


def test_configs_are_compared_and_arms_told_apart(run) -> None:
    runs = [run("lrsa", {4: right(0.5)}, lag=lag, seed=seed) for lag in (64, 128) for seed in (0, 1)]
    found = differences(runs)
    assert found == {
        "run.seed": ["0", "1", "0", "1"],
        "attention.lag_size": ["64", "64", "128", "128"],
        "evaluation.attention.lag_size": ["64", "64", "128", "128"],
    }
    assert short_names(list(found)) == {
        "run.seed": "seed",
        "attention.lag_size": "attention.lag_size",
        "evaluation.attention.lag_size": "evaluation.attention.lag_size",
    }
    apart = told_apart([*runs, run("dense", {4: right(0.1)})])
    assert [record.arm for record in apart] == [
        "lrsa lag_size=64",
        "lrsa lag_size=64",
        "lrsa lag_size=128",
        "lrsa lag_size=128",
        "dense",
    ]
    assert len(build_table(apart, **FAST).rows) == 3
    longer = [run("lrsa", {4: right(0.5)}, lag=lag, length=length) for lag in (64, 128) for length in (1024, 2048)]
    together = [record.arm for record in told_apart(longer, but=("evaluation.length",))]
    assert together == ["lrsa lag_size=64"] * 2 + ["lrsa lag_size=128"] * 2
    two_tasks = [run("lrsa", {4: right(0.5)}, task=task, lag=lag) for task, lag in (("needles", 8), ("squad", 16))]
    assert [record.arm for record in told_apart(two_tasks)] == ["lrsa", "lrsa"], "they claim different cells"


@dataclass
class Map:
    """As `lrsa.evaluation.kept.KeptMap`."""

    tokens: list[str]
    kept: np.ndarray
    ranked: np.ndarray


@pytest.fixture
def kept() -> Map:
    rng = np.random.default_rng(0)
    tokens = ["<b>", " costs", " $5\n", "naïve ", "語", " a" * 200] + [f" word{k}" for k in range(194)]
    held, ranked = rng.random((4, 2, 200)) < 0.25, np.zeros((4, 200), dtype=bool)
    ranked[:, 3:150] = True
    held[:, :, :3] = held[:, :, 150:] = True
    held[2, 1, 3], held[:, :, 4] = True, False
    return Map(tokens, held, ranked)


def test_kept_tokens_are_shaded_as_they_are_kept(kept: Map, tmp_path: Path) -> None:
    np.testing.assert_array_equal(kept_share(kept, 2, 1), kept.kept[2, 1])
    assert kept_share(kept)[4] == 0 and kept_share(kept)[0] == 1
    figure = kept_figure(kept, "a title")
    raster = figure.axes[1].collections[0].get_array()
    assert raster.shape == (4, 200) and raster[2, 3] == kept.kept[2, :, 3].mean()
    assert raster.mask[:, :3].all() and raster.mask[:, 150:].all(), "never ranked"
    text = kept_text_figure(kept, layer=2, head=1)
    lines = [line.get_text() for line in text.axes[0].texts]
    assert lines[0] == r"<b> costs \$5⏎" and lines[1].startswith("naïve □"), "a glyph that the font lacks"
    assert "".join(lines).endswith(" word193")
    boxes = sum(bool(flag) for flag in kept.kept[2, 1])
    assert len(text.axes[0].patches) >= boxes
    save_figure(figure, tmp_path, "raster")
    save_figure(text, tmp_path, "text")
    shaded = kept_html(kept, layer=2, head=1)
    assert "&lt;b&gt;" in shaded and "<b>" not in shaded
    assert 'title="4: kept by 0%">語' in shaded and 'title="3: kept by 100%">naïve' in shaded


def test_kept_figures_refuse_what_is_not_there(kept: Map) -> None:
    with pytest.raises(ValueError, match="layer=4 is not among 4: choose 0 to 3, or None"):
        kept_text_figure(kept, layer=4)
    with pytest.raises(ValueError, match="start=5 and stop=5: no tokens"):
        kept_text_figure(kept, start=5, stop=5)
    long = Map([" w"] * 2000, np.ones((1, 1, 2000), dtype=bool), np.ones((1, 2000), dtype=bool))
    with pytest.raises(ValueError, match="more than the 1,200 of a page: set stop=1200"):
        kept_text_figure(long)
    assert kept_figure(long).axes[1].collections[0].get_array().shape == (1, 1600)
