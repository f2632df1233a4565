"""Which blocks of keys each block of queries sees, and which see it, in closed form: no T x T mask is ever made.

A row is a query from position S on, so that partitions of whole blocks begin with a block. Keys are
``[sinks | kept | gap to a block | raw keys from position S on | tail to a block]``. With n compressed partitions a row
sees a prefix of the first, ``S + nK`` entries, and a range of the raw keys, from ``nL`` to its own; both ends grow with
the row, so that the first and the last row of a block of queries say it all.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa.attention.layout import Geometry

KEY_BLOCK = 128
# Of a processor's work that a single column may be: what others may wait for it at the end. Where half of the raw keys'
# columns, which are short, are the last (`layout`, ``group``), it may be as much as all of them are together: measured.
TAIL = 1 / 16
SHORTEST_WINDOW = 16  # query blocks; a shorter piece would pay more for its start than it saves


class Walk(NamedTuple):
    """How the backward pass walks the columns: a processor takes a block of keys and goes through the queries that see
    it, adding to their gradients. Those of the oldest kept keys are all later ones.

    ``window``: query blocks at whose multiples columns of the buffer are cut, their keys standing in line once for each
    piece; 0: never; None: as `TAIL` asks for. ``descending``: the last query block first, with which all columns of
    the buffer end, so that those which run side by side read and add to the same ones while the L2 cache holds them.
    From their first ones on, columns would stand 1/r blocks apart: at 1/8 and D 128 that is 135 MB for 132 processors,
    and the memory's bandwidth is the limit.
    """

    window: int | None = None
    descending: bool = True


class Lists(NamedTuple):
    """Of each block of queries (or keys) the blocks of the other kind, int32, as flash-attn-4 wants them: ``partial``
    ones, which need the mask, and ``full`` ones. Counts ``[1, 1, N]``, the first so many of ``[1, 1, N, W]`` count."""

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


class Mask(NamedTuple):
    """What `visible` needs to know. ``skipped``: keys that stand before the buffer, which the lists call full."""

    lag: int
    chunk: int
    sink: int
    kept: int
    raw_offset: int
    skipped: int = 0


class Layout(NamedTuple):
    """The lists of both passes.

    Attributes:
        length: keys, whole blocks, the raw ones from ``mask.raw_offset`` on.
        again: of each window but the first how much of the buffer's beginning stands before the keys once more in
            the backward pass, in that order; ``mask_backward.skipped`` keys in all.
        group: heads whose blocks of queries stand one after the other in ``backward``, as `layout` was told; or None.
    """

    length: int
    query_block: int
    mask: Mask
    mask_backward: Mask
    forward: Lists
    backward: Lists
    again: tuple[int, ...]
    group: int | None = None


def compressed_partitions(row, *, lag, chunk):
    """How many partitions a row sees compressed. Plain arithmetic, for tensors and for what CuTe compiles alike, whose
    quotients of negative numbers are others."""
    first = -(-2 * lag // chunk) * chunk - 2 * lag  # of the rows' grid of chunks, which begins at row 2L
    before = -(-first // lag) + 1
    compressed = ((row + first) // chunk * chunk - first + before * lag) // lag - before - 1
    return compressed * ((compressed + 2**20) // 2**20)  # not below 0, as it comes out before the first compression


def first_row_of(count, *, lag, chunk):
    """The first row that sees ``count`` partitions compressed, of at least one; plain arithmetic too."""
    first = -(-2 * lag // chunk) * chunk - 2 * lag
    return ((count + 1) * lag + first + chunk - 1) // chunk * chunk - first


def visible(row, column, *, lag, chunk, sink, kept, raw_offset, skipped):
    """Whether a row sees a key; plain arithmetic too.

    All but the last line is a row's alone, of which a kernel's thread has two in 64 pairs: three comparisons a pair.
    """
    compressed = compressed_partitions(row, lag=lag, chunk=chunk)
    seen = skipped + sink + compressed * kept
    raw = skipped + raw_offset
    return (column < seen) | ((column >= raw + compressed * lag) & (column <= raw + row))


WALK = Walk()


@functools.lru_cache(maxsize=512)  # a pyramid of 36 layers has as many, for each compression
def layout(
    geometry: Geometry,
    tokens: int,
    device: torch.device,
    walk: Walk,
    heads: float,
    query_block: int = KEY_BLOCK,
    group: int | None = None,
) -> Layout:
    """Of ``tokens`` tokens, of which some query sees some compressed.

    Args:
        heads: query heads, of all rows of a batch, for each processor of the device.
        group: query heads whose rows of blocks stand one after the other in the backward pass' lists, which are then
            walked through with raw keys' columns at the end (`hopper.backward`). None: a head at a time, each one's
            columns in line.
    """
    rows, sink = tokens - geometry.sink, geometry.sink
    edges = _edges(geometry, rows, query_block)
    used = sink + geometry.selected_partitions(tokens) * geometry.kept
    buffer, raw = -(-used // KEY_BLOCK), -(-rows // KEY_BLOCK)
    mask = Mask(geometry.lag, geometry.chunk, sink, geometry.kept, buffer * KEY_BLOCK)
    forward = _forward(edges, buffer)
    window = walk.window
    if window is None:
        pairs = int(sum(counts.sum() for counts in (forward.partial_count, forward.full_count)))
        allowed = TAIL * pairs
        if group:  # to the nearest power of two, for each further piece is one more copy
            of_raw = int((edges.last_row // KEY_BLOCK + 1 - edges.first_raw // KEY_BLOCK).sum())
            allowed = max(allowed, of_raw) * math.sqrt(2)
        window = _window(allowed * heads, len(edges.first_row))
    backward, again = _backward(edges, query_block, buffer, raw, window, walk, group or 1)
    return Layout(
        length=(buffer + raw) * KEY_BLOCK,
        query_block=query_block,
        mask=mask,
        mask_backward=mask._replace(skipped=sum(again)),
        forward=Lists(*(x.to(device) for x in forward)),
        backward=Lists(*(x.to(device) for x in backward)),
        again=again,
        group=group,
    )


class _Edges(NamedTuple):
    """What the first and the last row of each block of queries see: ``[N]`` each, none of them ever falling."""

    first_row: Tensor
    last_row: Tensor
    least_kept: Tensor
    most_kept: Tensor
    first_raw: Tensor
    last_raw: Tensor


def _edges(geometry: Geometry, rows: int, query_block: int) -> _Edges:
    first_row = torch.arange(0, rows, query_block)
    last_row = (first_row + query_block).clamp(max=rows) - 1
    first, last = (
        torch.tensor([geometry.compressed(geometry.chunk_start(geometry.sink + row)) for row in edge.tolist()])
        for edge in (first_row, last_row)
    )
    least_kept, most_kept = (geometry.sink + n * geometry.kept for n in (first, last))
    return _Edges(first_row, last_row, least_kept, most_kept, first * geometry.lag, last * geometry.lag)


def _window(allowed: float, query_blocks: int) -> int:
    """A power of two; 0 where the longest column is short enough. ``allowed``: pairs of blocks of a column."""
    longest = max(SHORTEST_WINDOW, int(allowed))
    return 0 if longest >= query_blocks else 1 << (longest.bit_length() - 1)


def _forward(edges: _Edges, buffer: int) -> Lists:
    full_kept = edges.least_kept // KEY_BLOCK
    kept = -(-edges.most_kept // KEY_BLOCK)
    # Raw blocks [begin, end), those of [full, masked) without a mask.
    begin, end = edges.first_raw // KEY_BLOCK, edges.last_row // KEY_BLOCK + 1
    full = (-(-edges.last_raw // KEY_BLOCK)).clamp(begin, end)
    masked = ((edges.first_row + 1) // KEY_BLOCK).clamp(full, end)
    nothing = torch.zeros_like(kept)
    partial_ranges = (full_kept, kept), (begin + buffer, full + buffer), (masked + buffer, end + buffer)
    full_ranges = (nothing, full_kept), (full + buffer, masked + buffer)
    return Lists(*_listed(partial_ranges), *_listed(full_ranges))


def _backward(
    edges: _Edges, query_block: int, buffer: int, raw: int, window: int, walk: Walk, group: int
) -> tuple[Lists, tuple[int, ...]]:
    """The transpose: columns of the buffer, which once they are full stay full, then those of the raw keys.

    A column that is cut keeps its first piece, with all its blocks that need a mask; the others stand in front, window
    by window, so that the long ones are begun first. Of further heads of a group all that needs no mask stands there.
    """
    count = len(edges.first_row)
    key = torch.arange(buffer) * KEY_BLOCK
    seen = torch.searchsorted(edges.most_kept, key, right=True)
    full = torch.searchsorted(edges.least_kept, key + KEY_BLOCK)
    stop = torch.full_like(seen, count)
    width = window or count
    if window:
        stop = (-(-torch.maximum(full, seen + 1) // window) * window).clamp(max=count)
    # Head, first block and number of columns of each piece in front.
    cut = [(0, begin, int((stop <= begin).sum())) for begin in range(width, count, width)]
    for head in range(1, group):
        cut += [(head, begin, int((full < min(begin + width, count)).sum())) for begin in range(0, count, width)]
    cut = [piece for piece in cut if piece[2]]
    none = key[:0]
    starts = torch.cat([none, *(torch.maximum(full[:n], none.new_tensor(b)) + head * count for head, b, n in cut)])
    stops = torch.cat([none, *(none.new_full((n,), min(b + width, count) + head * count) for head, b, n in cut)])
    front = torch.zeros_like(starts)

    key = torch.arange(raw) * KEY_BLOCK
    begin = key // query_block
    end = torch.searchsorted(edges.first_raw, key + KEY_BLOCK)
    whole = (-(-(key + KEY_BLOCK - 1) // query_block)).clamp(begin, end)
    masked = torch.searchsorted(edges.last_raw, key, right=True).clamp(whole, end)

    partial_ranges, full_ranges = [], []
    for head in range(group):
        before, first = head * count, head == 0
        partial_ranges += [
            (torch.cat([front, seen + before, begin + before]), torch.cat([front, full + before, whole + before])),
            (torch.cat([front, full + before, masked + before]), torch.cat([front, full + before, end + before])),
        ]
        own = (starts, full, stops, stop) if first else (front, full + before, front, full + before)
        full_ranges.append((torch.cat([*own[:2], whole + before]), torch.cat([*own[2:], masked + before])))
    lists = *_listed(tuple(partial_ranges), walk.descending), *_listed(tuple(full_ranges), walk.descending)
    return Lists(*lists), tuple(columns * KEY_BLOCK for _, _, columns in cut)


def _listed(ranges: tuple[tuple[Tensor, Tensor], ...], descending: bool = False) -> tuple[Tensor, Tensor]:
    """Ranges ``[start, stop)``, each ``[N]``, one after the other: counts and indices of `Lists`."""
    lengths = [(stop - start).clamp(min=0) for start, stop in ranges]
    count = torch.stack(lengths).sum(0)
    place = torch.arange(max(1, int(count.max())))[None]  # the kernels want a dimension that is not empty
    if descending:
        place = (count[:, None] - 1 - place).clamp(min=0)
    index, before = torch.zeros(len(count), place.shape[1], dtype=torch.int64), torch.zeros_like(count)
    for (start, _), length in zip(ranges, lengths, strict=True):
        inside = (place >= before[:, None]) & (place < (before + length)[:, None])
        index = torch.where(inside, place + (start - before)[:, None], index)
        before = before + length
    return count.to(torch.int32)[None, None], index.to(torch.int32)[None, None].contiguous()
