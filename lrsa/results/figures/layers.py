"""Which layers need the full cache, as `lrsa-eval mode=layers` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrsa.results.figures.style import STYLE, TEXT_WIDTH, ArmStyle, add_caption, add_legend, arm_styles, plain_grid


def layers_figure(found: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Figure:
    """Two panels, a line a task, nats an answer token: with each layer alone added to the dense ones of the start, and
    after each layer that was added, named below; dotted: with every layer dense.

    Args:
        found: of `lrsa.results.layers.read_layers`.
        names: of tasks, as the legend shall have them; the others keep theirs.
    """
    full, (start, *rounds) = found["full"], found["rounds"]
    styles, names = arm_styles(full["tasks"]), names or {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(TEXT_WIDTH, 2.5), layout="constrained")
        alone, added = figure.subplots(1, 2)
        for task, style in styles.items():
            tried = rounds[0]["candidates"] if rounds else []
            _line(alone, [of["layer"] for of in tried], tried, task, names, style)
            _line(added, range(len(rounds) + 1), [start, *rounds], task, names, style)
            for axes in (alone, added):
                axes.axhline(full["tasks"][task]["nll"], color=style.colour, linewidth=1.0, linestyle=":")
        alone.set_title("One layer dense", loc="left", fontweight="bold")
        alone.set_xlabel("which layer")
        alone.set_ylabel("nats an answer token")
        alone.xaxis.set_major_locator(MaxNLocator(integer=True))
        added.set_title("One more after the other", loc="left", fontweight="bold")
        added.set_xlabel("layer added")
        added.set_xticks(range(len(rounds) + 1), ["none", *(str(of["layer"]) for of in rounds)])
        for axes in (alone, added):
            axes.set_ylim(bottom=0)
            plain_grid(axes)
        add_legend(figure, [alone, added])
        n = ", ".join(f"{names.get(task, task)} {of['n']:,}" for task, of in full["tasks"].items())
        dense = f" Dense from the start: {', '.join(map(str, found['start']))}." if found["start"] else ""
        add_caption(figure, f"Every other layer compressed; dotted: all layers dense.{dense} n, answers: {n}.")
    return figure


def _line(
    axes: Axes,
    at: Sequence[int],
    scores: Sequence[Mapping[str, Any]],
    task: str,
    names: Mapping[str, str],
    style: ArmStyle,
) -> None:
    values = [of["tasks"][task]["nll"] for of in scores]
    axes.plot(at, values, **style.line | {"markersize": 2.8}, label=names.get(task, task))
