"""The file, the numbers by name, the table and the setting of `lrsa-eval mode=layers`."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from lrsa.results import RecordError
from lrsa.results.figures import layers_figure, save_figure
from lrsa.results.layers import as_override, layers_metrics, layers_table, read_layers, write_layers
from lrsa.results.summary import TrackedName, tracked_metrics


def scored(layer: int | None, nll: float, exact: float) -> dict:
    return {"layer": layer, "nll": nll, "exact": exact, "tasks": {"needles": {"nll": nll, "exact": exact, "n": 8}}}


TRIED = [
    [scored(0, 1.5, 0.25), scored(1, 0.75, 0.5), scored(3, 1.25, 0.375)],
    [scored(0, 0.5, 0.625), scored(3, 0.625, 0.5)],
]
FOUND = {
    "start": [2],
    "order": [2, 1, 0],
    "full": {name: value for name, value in scored(None, 0.125, 0.875).items() if name != "layer"},
    "rounds": [
        {**scored(None, 2.0, 0.125), "candidates": []},
        {**TRIED[0][1], "candidates": TRIED[0]},
        {**TRIED[1][0], "candidates": TRIED[1]},
    ],
}


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    write_layers(tmp_path, {**FOUND, "order": [2]})
    write_layers(tmp_path, FOUND)
    assert read_layers(tmp_path) == FOUND == json.loads((tmp_path / "layers.json").read_text())
    (tmp_path / "layers.json").write_text("[")
    with pytest.raises(RecordError, match=r"layers.json: .*mode=layers writes it"):
        read_layers(tmp_path)


def test_numbers_by_name() -> None:
    metrics = layers_metrics(FOUND)
    assert {name: value for name, value in metrics.items() if "/nll/" in name} == {
        "layers/nll/0": 2.0,
        "layers/nll/1": 0.75,
        "layers/nll/2": 0.5,
        "layers/nll/all": 0.125,
    }
    assert metrics["layers/exact/2"] == 0.625 and metrics["layers/exact/all"] == 0.875
    assert [metrics.get(f"layers/layer/{column}") for column in (0, 1, 2, "all")] == [None, 1, 0, None]
    assert tracked_metrics([], metrics)[str(TrackedName("layers", "2", "nll"))] == 0.5


def test_the_table_and_the_setting_say_it() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(layers_table(FOUND))
    text = captured.get()
    assert "Layers that need the full cache, in order (dense from the start: 2)" in " ".join(text.split())
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for row in ("0 none 2.0000 12.5", "1 1 0.7500 50.0 3 1.2500", "2 0 0.5000 62.5 3 0.6250", "every 0.1250 87.5"):
        assert row in rows
    assert as_override(FOUND) == "model.retrieval_layers=[2,1,0]"


def test_the_figure_shows_each_layer_alone_and_the_order(tmp_path: Path) -> None:
    figure = layers_figure(FOUND, {"needles": "Needles"})
    alone, added = figure.axes
    assert [line.get_xydata().tolist() for line in alone.lines if line.get_label() == "Needles"] == [
        [[0, 1.5], [1, 0.75], [3, 1.25]]
    ]
    assert [line.get_ydata().tolist() for line in added.lines if line.get_label() == "Needles"] == [[2.0, 0.75, 0.5]]
    assert [label.get_text() for label in added.get_xticklabels()] == ["none", "1", "0"]
    assert {line.get_ydata()[0] for line in (alone.lines[-1], added.lines[-1])} == {0.125}  # every layer dense
    assert "start: 2." in figure.texts[-1].get_text().replace("\n", " ")
    assert [path.name for path in save_figure(figure, tmp_path, "layers")] == ["layers.pdf", "layers.png"]
