"""What training did by step, and how fast runs were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lrsa.results.figures.style import (
    STYLE,
    ArmStyle,
    add_caption,
    add_legend,
    arm_styles,
    label_outer,
    make_panels,
    plain_grid,
)
from lrsa.results.grids import NothingToShow
from lrsa.results.record import Record
from lrsa.results.store import cells_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 0.05  # of a curve's points, in a running mean


def loss_figure(
    records: Sequence[Record],
    names: Mapping[str, str] | None = None,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Figure:
    """Training loss by optimiser step on a log axis, a line a run, a colour an arm. Runs without `training.loss_curve`
    are left out. `styles`: by displayed name.

    Raises ValueError when no record has one.
    """
    curves = [
        ((names or {}).get(record.arm, record.arm), curve)
        for record in records
        if (curve := (record.training or {}).get("loss_curve")) and curve["step"]
    ]
    if not curves:
        raise NothingToShow("no record holds a loss curve (training.loss_curve): only training runs have one")
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    styles = styles or arm_styles(arms)
    figure, (axes,) = make_panels(1)
    with mpl.rc_context(STYLE):
        for position, (arm, curve) in enumerate(curves):
            first = all(before != arm for before, _ in curves[:position])
            loss = np.array([np.nan if value is None else value for value in curve["loss"]], dtype=float)
            smooth, every = running_mean(loss), max(1, len(loss) // 6)
            axes.plot(curve["step"], loss, color=styles[arm].colour, linewidth=0.4, alpha=0.3, zorder=1)
            axes.plot(
                curve["step"],
                smooth,
                **styles[arm].line,
                label=arm if first else "_",
                markevery=(position * every // len(curves), every),  # marks of runs in turn
                zorder=3,
            )
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        plain_grid(axes)
        label_outer([axes], "optimiser step", "loss, nats a token")
        add_legend(figure, [axes])
        runs = ", ".join(f"{arm} {sum(other == arm for other, _ in curves)}" for arm in arms)
        window = f"running means over {100 * SMOOTH:.0f}% of the steps" if SMOOTH * len(smooth) > 1 else "every step"
        add_caption(figure, f"A line a run ({runs}): {window}; thin: as logged.")
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Of a curve ``[points]``: centred means over `SMOOTH` of the curve, over less at its ends."""
    window = max(1, round(SMOOTH * len(values)))
    return pd.Series(values).rolling(window, center=True, min_periods=1).mean().to_numpy()


def throughput_figure(
    records: Sequence[Record],
    names: Mapping[str, str] | None = None,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Figure:
    """Tokens a second of evaluation by nominal compression, a panel a device, a line an arm: means over runs and tasks
    with their range. Of what stood in the cells (`tokens_per_second`), measured as a by-product: not a benchmark, which
    is `lrsa-bench`.

    Raises ValueError when no cell says it.
    """
    cells = cells_frame(records)
    device = {record.id: str(record.hardware.get("device", "unknown device")) for record in records}
    if "tokens_per_second" not in cells or not cells["tokens_per_second"].notna().any():
        raise NothingToShow("no cell says tokens_per_second: evaluation records of lrsa-train and lrsa-eval do")
    cells = cells[cells["tokens_per_second"].notna() & (cells["context"] == "full")]
    cells = cells.assign(
        device=cells["record"].map(device), arm=cells["arm"].map(lambda arm: (names or {}).get(arm, arm))
    )
    styles = styles or arm_styles(cells["arm"])
    devices = list(dict.fromkeys(cells["device"]))
    figure, panels = make_panels(len(devices))
    with mpl.rc_context(STYLE):
        for name, axes in zip(devices, panels, strict=True):
            for arm, line in cells[cells["device"] == name].groupby("arm", sort=False):
                _draw_speed(axes, line, str(arm), styles[str(arm)])
            axes.set_title(name, loc="left", fontweight="bold")
            factors = sorted(set(cells["compression"]))
            axes.set_xscale("log", base=2)
            axes.set_xticks(factors, ["full" if factor == 1 else f"{factor:g}×" for factor in factors])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            plain_grid(axes)
        label_outer(panels, "nominal KV compression", "tokens a second, evaluation")
        add_legend(figure, panels)
        add_caption(
            figure, "Means over runs and tasks, bars from least to most. By-product of evaluation: see lrsa-bench."
        )
    return figure


def _draw_speed(axes: Axes, cells: pd.DataFrame, arm: str, style: ArmStyle) -> None:
    speed = cells.groupby("compression")["tokens_per_second"].agg(["mean", "min", "max"])
    apart = np.abs(speed[["min", "max"]].to_numpy(dtype=float).T - speed["mean"].to_numpy(dtype=float))
    x = speed.index.to_numpy(dtype=float)
    axes.errorbar(x, speed["mean"], apart, fmt="none", ecolor=style.colour, elinewidth=0.7, alpha=0.55)
    axes.plot(x, speed["mean"], **style.line, label=arm, zorder=3)
