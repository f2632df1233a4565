"""Which tokens of a prompt are kept: layers x positions, and the prompt's own text shaded token by token.

All take what `lrsa.evaluation.kept.kept_map` returns; here only its arrays are read.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lrsa.results.figures.style import COLOURS, STYLE, TEXT_WIDTH, add_caption

KEPT = COLOURS[0]
UNRANKED = "0.9"
_SHARE = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#a6cbe3", KEPT, "#003a5c"])
_MOST_COLUMNS = 1600  # more than this a printed line does not resolve
_PER_LINE = 144  # characters of a line of text
_MOST_TOKENS = 1200


class Kept(Protocol):
    """`lrsa.evaluation.kept.KeptMap`: L layers, H key/value heads, T tokens."""

    @property
    def tokens(self) -> list[str]: ...  # T pieces of text
    @property
    def kept(self) -> np.ndarray: ...  # bool [L, H, T]
    @property
    def ranked(self) -> np.ndarray: ...  # bool [L, T], among which a layer chose


def kept_share(found: Kept, layer: int | None = None, head: int | None = None) -> np.ndarray:
    """float ``[T]``: the share of the chosen heads that keep each token; None: all layers, all heads.

    Raises ValueError for a layer or head that the model does not have.
    """
    layers, heads, _ = found.kept.shape
    for name, index, count in (("layer", layer, layers), ("head", head, heads)):
        if index is not None and not 0 <= index < count:
            raise ValueError(f"{name}={index} is not among {count}: choose 0 to {count - 1}, or None for all")
    chosen = found.kept if layer is None else found.kept[layer : layer + 1]
    chosen = chosen if head is None else chosen[:, head : head + 1]
    return np.asarray(chosen.mean(axis=(0, 1)))


def kept_figure(found: Kept, title: str = "") -> Figure:
    """Layers x positions: how many of a layer's heads keep each token, and above it the share over all layers. Grey
    above the raster: what is never ranked, sinks and the raw tail. A prompt longer than print resolves is drawn as
    means of neighbouring tokens.
    """
    layers, heads, tokens = found.kept.shape
    edges = np.linspace(0, tokens, min(tokens, _MOST_COLUMNS) + 1).astype(int)
    widths = np.diff(edges)
    raster = np.add.reduceat(found.kept.mean(axis=1), edges[:-1], axis=1) / widths
    raster = np.ma.masked_where(~found.ranked[:, edges[:-1]], raster)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(TEXT_WIDTH, 1.35 + 0.062 * layers), layout="constrained")
        top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[0.55, 0.2 + 0.062 * layers])
        share = np.add.reduceat(found.kept.mean(axis=(0, 1)), edges[:-1]) / widths
        top.stairs(100 * share, edges, fill=True, color=KEPT, linewidth=0)
        for start, stop in _runs(_never_ranked(found, None)):
            top.axvspan(start, stop, color=UNRANKED, linewidth=0)
        top.set_ylim(0, 104)
        top.set_yticks([0, 50, 100])
        top.set_ylabel("kept by, %\nof all heads", fontsize=7)
        if title:
            top.set_title(title, loc="left", fontweight="bold")
        axes.patch.set_facecolor(UNRANKED)
        image = axes.pcolormesh(
            edges, np.arange(layers + 1) - 0.5, raster, cmap=_SHARE, vmin=0, vmax=1, rasterized=True
        )
        axes.set_ylim(layers - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlim(0, tokens)
        axes.set_ylabel("layer")
        axes.set_xlabel("position in the prompt, tokens")
        bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.012, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0", "50", "100"])
        bar.outline.set_visible(False)
        bar.set_label("heads that keep it, %", fontsize=7)
        held = found.kept.sum(-1).mean()
        add_caption(
            figure,
            f"{layers} layers, {heads} key/value heads, a prompt of {tokens:,} tokens: a head holds {held:,.0f} "
            f"of them on average (full / kept: {tokens / held:.2f}x). Grey: never ranked, sinks and the raw tail.",
        )
    return figure


def kept_text_figure(
    found: Kept, *, layer: int | None = None, head: int | None = None, start: int = 0, stop: int | None = None
) -> Figure:
    """The prompt's tokens `start` to `stop` as text, each shaded by the share of the chosen heads that keep it (of one
    head: kept or not); grey: never ranked.

    Raises ValueError for a layer or head that the model does not have, an empty range, and more than 1,200 tokens.
    """
    share, stop = kept_share(found, layer, head), len(found.tokens) if stop is None else min(stop, len(found.tokens))
    if not 0 <= start < stop:
        raise ValueError(f"start={start} and stop={stop}: no tokens of the {len(found.tokens)} are between them")
    if stop - start > _MOST_TOKENS:
        raise ValueError(
            f"tokens {start} to {stop} are {stop - start:,}, more than the {_MOST_TOKENS:,} of a page: "
            f"set stop={start + _MOST_TOKENS}"
        )
    unranked = _never_ranked(found, layer)
    lines = list(_lines(found.tokens[start:stop]))
    size = 5.6
    advance, leading = 0.602 * size / 72, 1.62 * size / 72  # inches, of DejaVu Sans Mono
    width, height = TEXT_WIDTH, leading * (len(lines) + 0.6)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        for row, line in enumerate(lines):
            y, x = leading * (row + 0.3), 0.06
            for index, text in line:
                token = start + index
                colour = UNRANKED if unranked[token] else _SHARE(0.5 * share[token])
                box = Rectangle((x, y), advance * len(text), 0.92 * leading, facecolor=colour, linewidth=0)
                if unranked[token] or share[token] > 0:
                    axes.add_patch(box)
                x += advance * len(text)
            joined = _drawable("".join(text for _, text in line))
            # `$` would start mathematics
            axes.text(
                0.06,
                y + 0.5 * leading,
                joined.replace("$", r"\$"),
                family="DejaVu Sans Mono",
                fontsize=size,
                va="center_baseline",
            )
        add_caption(figure, _text_caption(found, layer, head, start, stop))
    return figure


def kept_html(found: Kept, *, layer: int | None = None, head: int | None = None) -> str:
    """The whole prompt as one HTML element, tokens shaded as in `kept_text_figure`; a token's share is its tooltip. The
    text is escaped; colours go with light and dark pages.

    Raises ValueError for a layer or head that the model does not have.
    """
    share = kept_share(found, layer, head)
    unranked = _never_ranked(found, layer)
    spans = []
    for position, text in enumerate(found.tokens):
        colour = "rgba(128,128,128,.22)" if unranked[position] else f"rgba(0,114,178,{0.6 * share[position]:.2f})"
        what = "never ranked" if unranked[position] else f"kept by {100 * share[position]:.0f}%"
        shade = f"background:{colour}" if unranked[position] or share[position] else "opacity:.55"
        spans.append(f'<span style="{shade}" title="{position}: {what}">{html.escape(text)}</span>')
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.65 ui-monospace,monospace"
    return f'<div class="kept" style="{style}">{"".join(spans)}</div>'


def _never_ranked(found: Kept, layer: int | None) -> np.ndarray:
    """bool ``[T]``: sinks and the raw tail, of one layer or of all."""
    return np.asarray(~(found.ranked.any(axis=0) if layer is None else found.ranked[layer]))


def _text_caption(found: Kept, layer: int | None, head: int | None, start: int, stop: int) -> str:
    of = f"layer {layer}" if layer is not None else "all layers"
    of += f", head {head}" if head is not None else ", all heads"
    whole = (
        "" if (start, stop) == (0, len(found.tokens)) else f"tokens {start:,} to {stop:,} of {len(found.tokens):,}; "
    )
    blue = "blue: kept" if layer is not None and head is not None else "the darker, the more heads keep it"
    return (
        f"{of[:1].upper()}{of[1:]}; {whole}{blue}; white: dropped by all; grey: never ranked, sinks and the raw tail."
    )


def _lines(tokens: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Lines of at most `_PER_LINE` characters, as (token, text) parts; breaks of the text are kept and shown."""
    line: list[tuple[int, str]] = []
    taken = 0
    for index, token in enumerate(tokens):
        for number, part in enumerate(token.replace("\t", "    ").split("\n")):
            if number:
                line.append((index, "⏎"))
                yield line
                line, taken = [], 0
            while part:
                room = _PER_LINE - taken
                if len(part) > room and taken and len(part) <= _PER_LINE:
                    yield line
                    line, taken = [], 0
                    continue
                line.append((index, part[:room]))
                taken += len(part[:room])
                part = part[room:]
                if taken >= _PER_LINE:
                    yield line
                    line, taken = [], 0
    if line:
        yield line


def _drawable(text: str) -> str:
    """What the font has no glyph for as a box."""
    glyphs = _glyphs()
    return "".join(mark if ord(mark) in glyphs else "□" for mark in text)


def _glyphs() -> Any:
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans Mono"))
    return font_manager.get_font(path).get_charmap()


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Half-open stretches where `flags` are True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    yield from ((int(a), int(b)) for a, b in edges.reshape(-1, 2))
