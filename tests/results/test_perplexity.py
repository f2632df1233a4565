"""Likelihoods of prose as perplexity, and differences in percent of it."""

import math
from pathlib import Path

import numpy as np
import pytest

from lrsa.config import TableConf
from lrsa.results import Record
from lrsa.results.perplexity import build_perplexity
from lrsa.results.tables import build_table
from lrsa.table import build

FAST = {"n_resamples": 200}


@pytest.fixture
def runs(tmp_path: Path) -> list[Record]:
    """Two arms that read the same five windows at full cache and 4x."""
    means = {("dense", 1): 2.7, ("dense", 4): 2.8, ("lrsa", 1): 2.71, ("lrsa", 4): 2.72}
    made = []
    for arm in ("dense", "lrsa"):
        record = Record.start(tmp_path / "runs" / arm, command="lrsa-eval", study="s", arm=arm, seed=0, config={})
        cells, rows = [], []
        for factor in (1, 4):
            nll = means[arm, factor] + np.linspace(-0.2, 0.2, 5)
            about = {"task": "prose", "compression": factor, "positions": [0, 64]}
            bounds = {"nll": nll.mean(), "nll_low": nll.min(), "nll_high": nll.max()}
            cells.append({**about, **bounds, "n": 5, "measured_ratio": {1: 1.0, 4: 3.4}[factor]})
            rows += [{**about, "id": f"w{k}", "nll": value, "tokens": 63} for k, value in enumerate(nll)]
        record.finish({}, cells, rows)
        made.append(record)
    return made


def test_values_are_exponentials_and_differences_percent(runs: list[Record]) -> None:
    table, nats = build_perplexity(runs, reference="dense", **FAST), build_table(runs, metric="nll", **FAST)
    for row, plain in zip((*table.rows, *table.differences), (*nats.rows, *nats.differences), strict=True):
        for cell, before in zip(row.cells, plain.cells, strict=True):
            one, other = cell.interval, before.interval
            assert one is not None and other is not None and one.n == other.n == 5
            for value, log in zip((one.mean, one.low, one.high), (other.mean, other.low, other.high), strict=True):
                assert value == pytest.approx(100 * (math.exp(log) - 1) if one.difference else math.exp(log))
    assert [cell.interval and round(cell.interval.mean, 2) for cell in table.differences[0].cells] == [1.01, -7.69]
    assert [cell.best for row in table.rows for cell in row.cells] == [cell.best for r in nats.rows for cell in r.cells]


def test_the_command_makes_it_against_the_full_cache_too(runs: list[Record], tmp_path: Path) -> None:
    conf = TableConf(records=[str(tmp_path / "runs")], metric="perplexity", reference="full", bootstrap=200)
    conf.output = str(tmp_path / "out")
    made = build(conf)
    assert made.table is not None and made.table.reference == "full"
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| prose | dense | 5 | **14.88** [" in text and "| prose | lrsa | 5 | 0.00 [0.00, 0.00] | +1.01 [" in text
    assert "**Difference to full, %**" in text and "- Perplexity, with its 95% interval over examples." in text
    assert [path.name for path in made.written if path.suffix == ".png"] == [], "likelihood by position is of nll"


def test_an_unknown_metric_names_those_there_are(runs: list[Record], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'ppl'; choose from exact, .*, perplexity"):
        build(TableConf(records=[str(tmp_path / "runs")], metric="ppl"))
    with pytest.raises(ValueError, match="unknown metric 'perplexity'; choose from exact, nll"):
        build(TableConf(records=[str(tmp_path / "runs")], metric="perplexity", retention="own"))
