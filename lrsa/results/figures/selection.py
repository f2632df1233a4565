"""What survives a selection and how far two agree, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrsa.results.figures.style import STYLE, TEXT_WIDTH, add_caption, add_legend, arm_styles, plain_grid
from lrsa.results.grids import NothingToShow


def selection_figure(found: Mapping[str, Any], compression: float, kind: str = "answer") -> Figure:
    """A row of panels a task, over the layers: how much likelier than any token one of the answer's is to be held, a
    line a model; and what share of its tokens another selection keeps too, with chance dotted.

    Args:
        found: of `lrsa.results.selection.read_selection`.
        kind: answer, key or passage.

    Raises:
        NothingToShow: nothing was found at this compression.
    """
    cells = [c for c in found["cells"] if c["compression"] == compression and c["survival"]["own"][kind] is not None]
    if not cells:
        raise NothingToShow(f"no {kind} was compressed at {compression:g}x")
    names, pairs = found["names"], list(dict.fromkeys((p["of"], p["with"]) for c in cells for p in c["agreement"]))
    across = 2 if pairs else 1
    models = arm_styles(names.values())
    labels = {pair: f"{names[pair[0]]} and {names.get(pair[1], pair[1])}" for pair in pairs}
    # of a rule that both are compared with one colour, dashed for the other model
    partners = {labels[pair]: labels["own", pair[1]] for pair in pairs if pair[0] != "own"}
    selections = arm_styles([*names.values(), *labels.values()], partners)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(TEXT_WIDTH * across / 2, 2.0 * len(cells) + 0.55), layout="constrained")
        panels = figure.subplots(len(cells), across, squeeze=False)
        for cell, row in zip(cells, panels, strict=True):
            _enrichment(row[0], cell, kind, names, models)
            if pairs:
                _agreement(row[1], cell, labels, selections)
        for axes in panels[-1]:
            axes.set_xlabel("layer")
        add_legend(figure, list(panels.flat))
        n = ", ".join(f"{c['task']} {c['survival']['own'][kind]['n']:,}" for c in cells)
        add_caption(
            figure,
            f"{compression:g}x. Left: share of the {kind}'s tokens held by a head when the answer begins, over the "
            "share of all compressed tokens that is held (dotted: chance). Right: of the tokens that one selection "
            f"keeps, those that the other keeps too, a head at a time (dotted: chance). n: {n}.",
        )
    return figure


def _enrichment(axes: Axes, cell: Mapping[str, Any], kind: str, names: Mapping[str, str], styles: Any) -> None:
    for model, name in names.items():
        of = cell["survival"][model][kind]
        _line(axes, cell["layers"], of["enrichment_by_layer"], name, styles[name])
    axes.axhline(1, color="0.4", linewidth=1.0, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{kind} held, times chance")
    _finish(axes, cell)


def _agreement(axes: Axes, cell: Mapping[str, Any], labels: Mapping[tuple[str, str], str], styles: Any) -> None:
    chance = None
    for pair in cell["agreement"]:
        if pair["found"] is not None:
            label = labels[pair["of"], pair["with"]]
            _line(axes, cell["layers"], 100 * np.array(pair["found"]["by_layer"]), label, styles[label])
            chance = 100 * np.array(pair["found"]["chance_by_layer"])
    if chance is not None:
        axes.plot(cell["layers"], chance, color="0.4", linewidth=1.0, linestyle=":")
    axes.set_ylim(0, 103)
    axes.set_ylabel("kept in common, %")
    _finish(axes, cell)


def _line(axes: Axes, layers: Sequence[int], values: Any, label: str, style: Any) -> None:
    axes.plot(layers, values, **style.line | {"markersize": 2.8}, label=label)


def _finish(axes: Axes, cell: Mapping[str, Any]) -> None:
    axes.set_title(str(cell["task"]), loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_grid(axes)
