"""The file, the numbers by name, the tables and the figure of `lrsa-eval mode=selection`."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lrsa.results import RecordError
from lrsa.results.figures import NothingToShow, save_figure, selection_figure
from lrsa.results.selection import read_selection, selection_metrics, selection_tables, write_selection
from lrsa.results.summary import TrackedName, tracked_metrics

LAYERS = [0, 2]


def survived(by_layer: list[float]) -> dict:
    mean = float(np.mean(by_layer))
    return {
        "n": 40,
        "tokens": 90,
        "survival": mean,
        "survival_low": mean - 0.1,
        "survival_high": mean + 0.1,
        "base": 0.25,
        "enrichment": 4 * mean,
        "by_layer": by_layer,
        "by_depth": [{"from": 0.2, "to": 0.4, "n": 40, "survival": mean}],
        "enrichment_by_layer": [4 * value for value in by_layer],
        "whole": {"by_layer": by_layer, "through": by_layer, "in_a_layer": 0.625, "anywhere": 0.875},
    }


def agreed(by_layer: list[float]) -> dict:
    mean = float(np.mean(by_layer))
    return {
        "n": 16,
        "shared": mean,
        "shared_low": mean,
        "shared_high": mean,
        "chance": 0.25,
        "jaccard": 0.2,
        "by_layer": by_layer,
        "chance_by_layer": [0.25, 0.25],
    }


def scores(exact: float, nll: float) -> dict:
    bounds = {"exact_low": exact - 0.05, "exact_high": exact + 0.05, "nll_low": nll - 0.5, "nll_high": nll + 0.5}
    return {"exact": exact, "nll": nll, **bounds}


PAIRS = [("own", "own"), ("against", "against"), ("own", "against"), ("against", "own")]
CELL = {
    "task": "needles",
    "compression": 4,
    "samples": 44,
    "layers": LAYERS,
    "survival": {
        "own": {"answer": survived([0.5, 0.75]), "key": None, "passage": survived([0.25, 0.25])},
        "against": {"answer": survived([0.25, 0.5]), "key": None, "passage": survived([0.25, 0.25])},
    },
    "survival_by_rule": [{"of": "own", "by": "oracle", "found": {"answer": survived([1.0, 0.5])}}],
    "agreement": [
        {"of": "own", "with": "oracle", "found": agreed([0.5, 0.75])},
        {"of": "against", "with": "oracle", "found": agreed([0.25, 0.5])},
        {"of": "own", "with": "against", "found": agreed([1.0, 0.5])},
    ],
    "swap": {
        "n": 40,
        "ids": ["a"],
        "cells": [
            {"weights": w, "selection": s, "values": {}, **scores(0.1 * k, 2.0)} for k, (w, s) in enumerate(PAIRS)
        ],
        "effects": {"both": scores(-0.1, 0.25), "selection_under_own_weights": scores(0.2, -0.125)},
    },
}
NAMES = {"own": "LRSA 4x", "against": "base"}


def test_numbers_by_name() -> None:
    metrics = selection_metrics([CELL])
    assert metrics["selection/needles/survival.answer.own/4x"] == 0.625
    assert metrics["selection/needles/enrichment.answer.against/4x"] == 1.5
    assert metrics["selection/needles/whole.answer.own/4x"] == 0.625
    assert metrics["selection/needles/survival.answer.own.oracle/4x"] == 0.75
    assert metrics["selection/needles/agreement.own.oracle/4x"] == 0.625
    assert metrics["selection/needles/exact.own.against/4x"] == pytest.approx(0.2)
    assert metrics["selection/needles/effect.nll.selection_under_own_weights/4x"] == -0.125
    assert not any("key" in name for name in metrics)
    tracked = tracked_metrics([], metrics)
    assert tracked[str(TrackedName("selection/needles", "4x", "survival.answer.own"))] == 0.625


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    written = write_selection(tmp_path, NAMES, [CELL])
    assert read_selection(tmp_path) == written == {"names": NAMES, "cells": [CELL]}
    (tmp_path / "selection.json").write_text("{")
    with pytest.raises(RecordError, match=r"selection.json: .*mode=selection writes it"):
        read_selection(tmp_path)


def test_the_tables_say_it() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        for table in selection_tables({"names": NAMES, "cells": [CELL]}):
            console.print(table)
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "needles 4x LRSA 4x answer 40 62.5 [52.5, 72.5] 25.0 2.50x 62.5 87.5" in lines
    assert "needles 4x LRSA 4x, by oracle answer 40 75.0 [65.0, 85.0] 25.0 3.00x 62.5 87.5" in lines
    assert "needles 4x LRSA 4x base 16 75.0 [75.0, 75.0] 25.0 20.0 50.0 100.0" in lines
    assert "needles 4x LRSA 4x base 40 20.0 [15.0, 25.0] 2.000 [1.500, 2.500]" in lines
    assert "needles 4x base 37.5 (n 40)" in lines and any("20 to 40" in line for line in lines)
    assert any("selection under LRSA 4x's weights 40 +20.0 [+15.0, +25.0] -0.125" in line for line in lines)
    alone = {
        **CELL,
        "survival": {"own": CELL["survival"]["own"]},
        "survival_by_rule": [],
        "agreement": [],
        "swap": None,
    }
    assert len(list(selection_tables({"names": {"own": "x"}, "cells": [alone]}))) == 2


def test_the_figure_shows_each_model_and_pair(tmp_path: Path) -> None:
    found = {"names": NAMES, "cells": [CELL, {**CELL, "task": "squad"}]}
    figure = selection_figure(found, 4)
    left, right, *rest = figure.axes
    assert len(rest) == 2 and left.get_title(loc="left") == "needles"
    lines = {line.get_label(): line for line in left.lines}
    assert lines["LRSA 4x"].get_xdata().tolist() == LAYERS and lines["LRSA 4x"].get_ydata().tolist() == [2, 3]
    assert lines["base"].get_ydata().tolist() == [1, 2]
    pairs = {line.get_label(): line for line in right.lines}
    assert pairs["LRSA 4x and base"].get_ydata().tolist() == [100, 50]
    own, other = pairs["LRSA 4x and oracle"], pairs["base and oracle"]
    assert own.get_color() == other.get_color() and (own.get_linestyle(), other.get_linestyle()) == ("-", "--")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted([*NAMES.values(), *(name for name in pairs if not name.startswith("_"))])
    assert all(path.stat().st_size > 5_000 for path in save_figure(figure, tmp_path, "selection"))
    with pytest.raises(NothingToShow, match="no key was compressed at 4x"):
        selection_figure(found, 4, "key")
    with pytest.raises(NothingToShow, match="at 8x"):
        selection_figure(found, 8)
