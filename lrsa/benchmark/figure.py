"""Records of `lrsa-bench mode=kernels` -> time against length, and the share of the ideal speed-up that is reached."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lrsa.benchmark.report import device_of
from lrsa.results.figures.style import COLOURS, COLUMN_WIDTH, MARKERS, STYLE, TEXT_WIDTH, add_caption, plain_grid
from lrsa.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
PEERS = {"nsa": "NSA", "moba": "MoBA"}

Row = Mapping[str, Any]
Shown = Mapping[str, Mapping[int, Row]]  # {what attends: {length: its row}}
Looks = Mapping[str, Mapping[str, Any]]  # {what attends: arguments of Axes.plot}


@dataclass(frozen=True)
class Series:
    """A line: what attends, and at which compression; None of a peer with blocks of its own. In order of the legend."""

    peer: bool
    lag: int
    method: str
    compression: float | None = None


def speed_figure(records: Sequence[Record]) -> Figure:
    """A column a compression: milliseconds of forward and of forward + backward, log-log, and below them the speed-up
    over dense as a share of the ideal one, the ratio of attended pairs. Peers with blocks of their own are in each.

    A case that several records have is the newest one's. Runs that did not end are left out.

    Raises:
        ValueError: no record has a row that passed its gate; or they are of several machines or shapes; or part of
            them, at one length, are of CUDA graphs.
    """
    records = [r for r in records if r.command == "lrsa-bench" and r.config["mode"] == "kernels"]
    records = [r for r in records if r.status == "finished"]
    shapes = sorted({_shape(record) for record in records})
    if len(shapes) > 1:
        raise ValueError(f"a figure is of one machine and shape, these records are of {'; '.join(shapes)}: name fewer")
    found = _series(records)
    if not found:
        raise ValueError(
            "none of the records is of a finished run of mode=kernels with a row that passed its gate: nothing to draw"
        )
    for length in sorted({length for rows in found.values() for length in rows}):
        if len({row["graphs"] for rows in found.values() for at, row in rows.items() if at == length}) > 1:
            raise ValueError(
                f"at {length:,} tokens some records are of CUDA graphs and some are not: name records of one kind"
            )
    ratios: list[float | None] = [*sorted({s.compression for s in found if s.compression is not None})] or [None]
    looks = {s.method: _look(i, s.peer) for i, s in enumerate({s.method: s for s in found}.values())}
    lengths = sorted({length for rows in found.values() for length in rows})
    with mpl.rc_context(STYLE):
        width = TEXT_WIDTH if len(ratios) > 1 else COLUMN_WIDTH
        figure = Figure(figsize=(width, 5.6), layout="constrained")
        panels = figure.subplots(3, len(ratios), sharex=True, sharey="row", squeeze=False)
        for ratio, column in zip(ratios, panels.T, strict=True):
            shown = {s.method: rows for s, rows in found.items() if s.compression in (ratio, None)}
            for (name, title), axes in zip(PASSES.items(), column[:2], strict=True):
                _draw_times(axes, name, shown, looks, lengths)
                axes.set_title(f"{title}{_keep(ratio)}", loc="left", fontweight="bold")
            _draw_shares(column[2], shown, looks, lengths)
            column[2].set_title(f"of the ideal{_keep(ratio)}", loc="left", fontweight="bold")
        for axes, label in zip(panels[:, 0], ("ms", "ms", "%"), strict=True):
            axes.set_ylabel(label)
        for axes in panels[2]:
            axes.set_xlabel("tokens")
        _format(panels, lengths)
        _legend(figure, looks, len(ratios))
        rounds = ", ".join(sorted({str(record.config["rounds"]) for record in records}))
        graphs = sorted({length for rows in found.values() for length, row in rows.items() if row["graphs"]})
        captured = f" Replays of CUDA graphs at {', '.join(f'{n:,}' for n in graphs)} tokens." if graphs else ""
        matched = any(s.peer and s.compression is not None for s in found)
        add_caption(
            figure,
            f"{shapes[0]}. Medians of {rounds} rounds, selection and gather included. Dense: the fastest kernel of the "
            "run. Ideal: dense pairs / attended pairs."
            + captured
            + (" Peers attend nearly as many keys as LRSA at the same ratio." if matched else ""),
        )
    return figure


def _keep(ratio: float | None) -> str:
    return "" if ratio is None else f", keep 1/{ratio:g}"


def _shape(record: Record) -> str:
    config = record.config
    heads = f"{config['query_heads']}/{config['key_value_heads']} heads"
    return f"{device_of(record)}, batch {config['batch_size']}, {heads}, D {config['head_dim']}, {config['dtype']}"


def _series(records: Sequence[Record]) -> dict[Series, dict[int, Mapping[str, Any]]]:
    rows = [(r, row) for r in sorted(records, key=lambda r: r.started) for row in r.metrics.get("rows", [])]
    rows = [(record, row) for record, row in rows if row.get("gate") == "passed" and "forward" in row]
    several = {key: len({row.get(key) for _, row in rows if "peer" not in row}) > 1 for key in ("scorer", "backend")}
    matched = {(row["peer"], row["lag"]) for _, row in rows if row.get("peer") and row["compression"] is not None}
    found: dict[Series, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record, row in rows:
        if "peer" not in row:
            scorer = row.get("scorer") or record.config["scorer"]
            parts = ["LRSA" if scorer == "lag_relative" and not several["scorer"] else scorer, f"L {row['lag']}"]
            method = ", ".join([*parts, *([row["backend"]] if several["backend"] else [])])
        elif row["compression"] is None:
            method = f"{PEERS[row['peer']]} {row['blocks']}x{row['block_size']}"
        else:
            method = PEERS[row["peer"]]
            if len([lag for peer, lag in matched if peer == row["peer"]]) > 1:
                method += f" as L {row['lag']}"
        lag = row["lag"] or 0
        drawn = {**row, "graphs": bool(record.config.get("graphs"))}
        found[Series("peer" in row, lag, method, row["compression"])][row["length"]] = drawn
    order = sorted(found, key=lambda s: (s.peer, s.lag, s.method, s.compression or 0))
    return {series: found[series] for series in order}


def _look(index: int, peer: bool) -> dict[str, Any]:
    colour = COLOURS[:-1][index % (len(COLOURS) - 1)]  # black is dense attention's
    return {
        "color": colour,
        "marker": MARKERS[:-1][index % (len(MARKERS) - 1)],
        "linestyle": (0, (4, 1.6)) if peer else "-",
        "markerfacecolor": "white" if peer else colour,
        "markeredgecolor": colour if peer else "white",
        "markeredgewidth": 0.9 if peer else 0.4,
        "markersize": 4.4,
    }


DENSE: dict[str, Any] = {"color": "black", "linewidth": 1.4, "marker": "X", "markersize": 4.4, "markeredgewidth": 0}
IDEAL: dict[str, Any] = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (1, 2))}
FORWARD = 0.35  # opacity of the forward pass where both are drawn


def _places(index: int, count: int, rows: Mapping[int, Row], lengths: Sequence[int]) -> list[float]:
    """Lengths; of a single one, beside each other."""
    apart = 1.06 ** (index - (count - 1) / 2) if len(lengths) == 1 else 1
    return [length * apart for length in sorted(rows)]


def _draw_times(axes: Axes, name: str, shown: Shown, looks: Looks, lengths: Sequence[int]) -> None:
    for index, (method, rows) in enumerate(shown.items()):
        times = [rows[t][name]["sparse"]["median"] for t in sorted(rows)]
        axes.plot(_places(index, len(shown), rows, lengths), times, **looks[method], zorder=3)
    dense: dict[int, list[float]] = defaultdict(list)
    for rows in shown.values():
        for length, row in rows.items():
            dense[length].append(row[name][row[f"{name}_dense"]]["median"])
    medians = [statistics.median(dense[t]) for t in sorted(dense)]
    if len(lengths) == 1:
        axes.axhline(medians[0], color="black", linewidth=1.4, zorder=2)
    else:
        axes.plot(sorted(dense), medians, **DENSE, zorder=2)


def _draw_shares(axes: Axes, shown: Shown, looks: Looks, lengths: Sequence[int]) -> None:
    axes.axhline(100, **IDEAL, zorder=1)
    for index, (method, rows) in enumerate(shown.items()):
        places = _places(index, len(shown), rows, lengths)
        for name in PASSES:
            shares = [100 * rows[t][f"{name}_speedup"] / rows[t]["ideal_speedup"] for t in sorted(rows)]
            axes.plot(places, shares, **looks[method], zorder=3, alpha=FORWARD if name == "forward" else 1)


def _format(panels: Any, lengths: Sequence[int]) -> None:
    first = panels[0, 0]
    first.set_xscale("log", base=2)
    first.set_xlim(lengths[0] / 1.35, lengths[-1] * 1.35)
    for axes in panels.flat:
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        plain_grid(axes)
    ticks = [step * 10.0**power for power in range(-4, 7) for step in (1, 2, 5)]
    for axes in panels[:2, 0]:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        low, high = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(ticks if high / low < 200 else ticks[::3]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[2, 0].set_ylim(0, max(105, panels[2, 0].get_ylim()[1]))


def _legend(figure: Figure, looks: Looks, columns: int) -> None:
    handles = [Line2D([], [], label="dense", **DENSE)]
    handles += [Line2D([], [], label=method, **look) for method, look in looks.items()]
    handles.append(Line2D([], [], label="ideal", **IDEAL))
    handles.append(Line2D([], [], color="0.2", alpha=FORWARD, marker="o", markersize=4.4, label="pale: forward alone"))
    options: dict[str, Any] = {"frameon": False, "columnspacing": 1.2, "handlelength": 2.4}
    across = 2 if columns == 1 else 5 if len(handles) < 6 else 4
    figure.legend(handles=handles, loc="outside upper center", ncols=across, **options)
