"""How figures look: one palette, one marker an arm over all figures, sizes of a two-column paper; and saving them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette (2008), told apart with any colour vision; yellow left out: too pale on white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "cividis"  # even steps of lightness, the same with any colour vision (Nuñez et al. 2018)
COLUMN_WIDTH = 3.35  # inches, one column of a two-column paper
TEXT_WIDTH = 6.9
PANELS_A_ROW = 3
GOLD_LINE: Any = (0, (7, 2, 1, 2))

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "pdf.fonttype": 42,  # TrueType, as publishers ask: text stays text
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class ArmStyle:
    """Colour and marker of an arm, the same in every figure of a table; `dashed`: it is shown beside the arm that it is
    the reference of, whose colour and marker it shares.
    """

    index: int
    dashed: bool = False

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def marker(self) -> str:
        # each round through the colours begins a marker later: no two of 49 arms look alike
        return MARKERS[(self.index + self.index // len(COLOURS)) % len(MARKERS)]

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {
            "color": self.colour,
            "linestyle": "--" if self.dashed else "-",
            "marker": self.marker,
            "markerfacecolor": "white" if self.dashed else self.colour,
            "markeredgecolor": self.colour if self.dashed else "white",
            "markeredgewidth": 0.8 if self.dashed else 0.4,
        }


def arm_styles(arms: Iterable[str], partners: Mapping[str, str] | None = None) -> dict[str, ArmStyle]:
    """A style an arm, in order; `partners`: of an arm that is another's own reference, that other."""
    arms, partners = list(dict.fromkeys(arms)), partners or {}
    groups = list(dict.fromkeys(partners.get(arm) or arm for arm in arms))
    return {arm: ArmStyle(groups.index(partners.get(arm) or arm), bool(partners.get(arm))) for arm in arms}


def save_figure(figure: Figure, folder: str | Path, stem: str) -> list[Path]:
    """Write `<stem>.pdf` and `<stem>.png` (300 dpi); returns the paths. Same figure, same bytes: no dates, no program
    version.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.pdf", folder / f"{stem}.png"]
    with mpl.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(paths[1], dpi=300, metadata={"Software": None})
    return paths


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels in rows of three; a single one is a column wide."""
    across = min(count, PANELS_A_ROW) or 1
    down = -(-count // across) or 1
    width = COLUMN_WIDTH if across == 1 else TEXT_WIDTH
    height = 2.45 if across < PANELS_A_ROW else 2.15
    with mpl.rc_context(STYLE):
        # not pyplot: it would keep every figure of a long run alive, and pick a window system
        figure = Figure(figsize=(width, height * down + 0.25), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def plain_grid(axes: Axes) -> None:
    """Thin lines across, behind the data."""
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)


def ratio_axis(axes: Axes, ratios: np.ndarray) -> None:
    """Log2 axis ticked at powers of two that the data span."""
    top = max(2.0, float(ratios.max()) if ratios.size else 2.0)
    powers = [2.0**power for power in range(int(np.floor(np.log2(top) + 1e-9)) + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.93, top * 1.08)
    axes.xaxis.set_major_locator(FixedLocator(powers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def percent_axis(axes: Axes, top: float) -> None:
    """From 0 to the smallest round number above the data: a task near its floor would be a flat line on 0 to 100."""
    limit, step = next(
        (pair for pair in ((10, 2), (20, 5), (30, 10), (40, 10), (60, 20), (80, 20)) if top <= pair[0]), (100, 25)
    )
    axes.set_ylim(-0.03 * limit, 1.03 * limit)
    axes.set_yticks(range(0, limit + 1, step))


def label_outer(panels: Sequence[Axes], x: str, y: str) -> None:
    """Axis labels once a row, and below the lowest panels: of three, the middle one's."""
    for index, axes in enumerate(panels):
        if index % PANELS_A_ROW == 0:
            axes.set_ylabel(y)
    last = panels[-(len(panels) % PANELS_A_ROW or PANELS_A_ROW) :]
    for axes in last[1:2] if len(last) == 3 else last:
        axes.set_xlabel(x)


def add_legend(figure: Figure, panels: Sequence[Axes], more: Sequence[tuple[str, Line2D]] = ()) -> None:
    """What any panel has, each label once, then `more`; in as many columns as fit above the panels."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    found |= {label: handle for label, handle in more}
    handles, labels = list(found.values()), list(found)
    room = 56 if len(panels) == 1 else 100  # characters a legend row holds at this size
    widths = [8 + len(label) for label in labels]  # a line and the space between entries count as 8
    fitting = (n for n in range(len(labels), 1, -1) if n * max(widths, default=0) <= room)  # columns are equally wide
    across = len(labels) if sum(widths) <= room else next(fitting, 1)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=across, frameon=False, columnspacing=1.2, handlelength=2.2
    )


def add_caption(figure: Figure, text: str) -> None:
    """Small print below the panels: what n is and the intervals are. The figure grows by it."""
    lines = textwrap.wrap(text, 150 if figure.get_figwidth() > COLUMN_WIDTH else 71, break_on_hyphens=False)
    width, height = figure.get_size_inches()
    room = 0.105 * len(lines) + 0.06
    figure.set_size_inches(width, height + room)
    share = room / (height + room)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, share, 1, 1 - share))
    else:
        for axes in figure.axes:
            left, bottom, across, up = axes.get_position().bounds
            axes.set_position((left, share + (1 - share) * bottom, across, (1 - share) * up))
    figure.text(
        0.03 / width, 0.03 / height, "\n".join(lines), fontsize=5.8, color="0.35", va="bottom", linespacing=1.15
    )
