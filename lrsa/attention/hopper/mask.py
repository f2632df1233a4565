"""The mask of a block that is seen in part, for a kernel's scores: a comparison or less a pair.

The library calls a mask function for each pair, and checks the length of what it calls full blocks. Here a thread
finds for each of its rows where what is seen ends (or, where the scores are transposed, for each of its keys with which
row it begins to be seen). Full blocks need nothing: what is beyond the tokens is in blocks that are seen in part.

L and C are whole blocks: then a block of raw keys is seen by whole blocks of rows, but for the one on the diagonal.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from flash_attn.cute.mask import mask_r2p_lambda, r2p_bitmask_below, sm90_col_to_r2p_idx
from quack import layout_utils

from lrsa.attention.blocks import compressed_partitions, first_row_of

NEVER = 2**30


class BlockMask:
    """In the place of the library's ``AttentionMask``, for `lrsa.attention.blocks`' lists.

    Args:
        seqlen: unused; the library makes a mask for the lengths of a batch's row.
        tile_m: queries of a tile; ``tile_n``: keys.
        transposed: scores stand ``[keys, queries]``.
        lag: L; ``chunk``: C.
    """

    def __init__(self, seqlen: object = None, *, tile_m: int, tile_n: int, transposed: bool, lag: int, chunk: int):
        self.tile_m, self.tile_n, self.transposed = tile_m, tile_n, transposed
        assert lag % tile_n == chunk % tile_n == 0, (lag, chunk)
        self.lag, self.chunk = lag, chunk

    @cute.jit
    def apply_mask(
        self,
        acc_S,
        batch_idx,
        head_idx,
        m_block,
        n_block,
        thr_mma,
        mask_seqlen,
        mask_causal,
        mask_local=False,
        mask_mod=None,
        aux_data=None,
        fastdiv_mods=None,
    ):
        """Sets scores that are not seen to minus infinity, where there is a ``mask_mod`` (which is not called)."""
        if const_expr(mask_mod is not None):
            if const_expr(self.transposed):
                self._mask_rows(acc_S, m_block, n_block, thr_mma, aux_data.scalars)
            else:
                self.mask_columns(acc_S, n_block, m_block, thr_mma, aux_data.scalars)

    def _places(self, thr_mma: Any) -> tuple[Any, Any]:
        """Of this thread's scores, and of the first thread's, which the compiler knows: ``[rows, columns]``."""
        shape = (self.tile_n, self.tile_m) if self.transposed else (self.tile_m, self.tile_n)
        places = cute.make_identity_tensor(shape)
        return tuple(
            layout_utils.reshape_acc_to_mn(thread.partition_C(places), transpose=self.transposed)
            for thread in (thr_mma, thr_mma.get_slice(0))
        )  # type: ignore[return-value]

    @cute.jit
    def mask_columns(self, acc_S, n_block, m_block, thr_mma, scalars, mask_seqlen=None):
        """Each row sees the first of the block's columns. ``mask_seqlen``: unused, as the library calls it."""
        scores = layout_utils.reshape_acc_to_mn(acc_S)
        places, _ = self._places(thr_mma)
        begin = n_block * self.tile_n + places[0, 0][1]  # this thread's first column
        for r in cutlass.range_constexpr(cute.size(scores.shape[0])):
            row = places[r, 0][0] + m_block * self.tile_m
            stop = end_of_columns(row, begin, scalars, self.lag, self.chunk) - begin
            below = sm90_col_to_r2p_idx(cutlass.max(stop, 0))
            mask_r2p_lambda(scores[r, None], lambda s, below=below: r2p_bitmask_below(below, s), rank1=True)

    @cute.jit
    def _mask_rows(self, acc_S, m_block, n_block, thr_mma, scalars):
        """Each key is seen from a row on: a kept one from its partition's compression, a raw one from its own."""
        scores = layout_utils.reshape_acc_to_mn(acc_S, transpose=True)
        places, known = self._places(thr_mma)
        tiles = scalars[4]  # of a head, whose rows begin at 0 again
        rows_before = m_block % tiles * self.tile_m + places[0, 0][1] - known[0, 0][1]
        for c in cutlass.range_constexpr(cute.size(scores.shape[1])):
            column = n_block * self.tile_n + places[0, c][0]
            start = first_row(column, scalars, self.lag, self.chunk) - rows_before
            for r in cutlass.range_constexpr(cute.size(scores.shape[0])):
                scores[r, c] = scores[r, c] if known[r, 0][1] >= start else -Float32.inf


@cute.jit
def end_of_columns(row, column, scalars, lag, chunk):
    """After which column a row sees no more of the part of the rows of keys, buffer or raw, where ``column`` is.

    ``scalars``: S, K, where the raw keys begin, and how many keys stand in front of the buffer.
    """
    sink, kept, raw_offset, skipped = scalars[0], scalars[1], scalars[2], scalars[3]
    end = skipped + sink + compressed_partitions(row, lag=lag, chunk=chunk) * kept
    if column >= skipped + raw_offset:
        end = skipped + raw_offset + row + 1
    return end


@cute.jit
def first_row(column, scalars, lag, chunk):
    """The first row that sees a column; ``scalars`` as of `end_of_columns`."""
    sink, kept, raw_offset, skipped = scalars[0], scalars[1], scalars[2], scalars[3]
    entry = column - skipped
    row = Int32(0)
    if entry >= raw_offset:
        row = entry - raw_offset
    elif entry >= sink:
        row = Int32(NEVER)
        if kept > 0:
            row = first_row_of((entry - sink) // kept + 1, lag=lag, chunk=chunk)
    return row
