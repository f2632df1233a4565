"""The mask of a block that is seen in part, for a kernel's scores: a comparison or less a pair.

The library calls a mask function for each pair, and checks the length of what it calls full blocks. Here a thread
finds for each of its rows (or, where the scores are transposed, for each of its keys) where what is seen begins and
ends. Full blocks need nothing: what is beyond the tokens is in blocks that are seen in part.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Uint32, const_expr, cute
from flash_attn.cute.mask import mask_r2p_lambda, r2p_bitmask_above, r2p_bitmask_below, sm90_col_to_r2p_idx
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
        self.lag, self.chunk = lag, chunk
        # Otherwise what a block of queries sees raw begins with a block of keys.
        self.unaligned = bool(lag % tile_n or chunk % tile_n)

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
                self._mask_columns(acc_S, m_block, n_block, thr_mma, aux_data.scalars)

    def _places(self, thr_mma: Any) -> tuple[Any, Any]:
        """Of this thread's scores, and of the first thread's, which the compiler knows: ``[rows, columns]``."""
        shape = (self.tile_n, self.tile_m) if self.transposed else (self.tile_m, self.tile_n)
        places = cute.make_identity_tensor(shape)
        return tuple(
            layout_utils.reshape_acc_to_mn(thread.partition_C(places), transpose=self.transposed)
            for thread in (thr_mma, thr_mma.get_slice(0))
        )  # type: ignore[return-value]

    @cute.jit
    def _mask_columns(self, acc_S, m_block, n_block, thr_mma, scalars):
        """Each row sees a range of the block's columns."""
        sink, kept, raw_offset, skipped = scalars[0], scalars[1], scalars[2], scalars[3]
        scores = layout_utils.reshape_acc_to_mn(acc_S)
        places, _ = self._places(thr_mma)
        begin = n_block * self.tile_n - skipped + places[0, 0][1]  # this thread's first column, in the buffer
        for r in cutlass.range_constexpr(cute.size(scores.shape[0])):
            row = places[r, 0][0] + m_block * self.tile_m
            compressed = compressed_partitions(row, lag=self.lag, chunk=self.chunk)
            start, stop = Int32(0), sink + compressed * kept - begin
            if begin >= raw_offset:
                start, stop = compressed * self.lag + raw_offset - begin, row + 1 + raw_offset - begin
            below = sm90_col_to_r2p_idx(cutlass.max(stop, 0))
            if const_expr(self.unaligned):
                above = sm90_col_to_r2p_idx(cutlass.max(start, 0))
                mask_r2p_lambda(
                    scores[r, None],
                    lambda s, below=below, above=above: r2p_bitmask_below(below, s) & r2p_bitmask_above(above, s),
                    rank1=True,
                )
            else:
                mask_r2p_lambda(scores[r, None], lambda s, below=below: r2p_bitmask_below(below, s), rank1=True)

    @cute.jit
    def _mask_rows(self, acc_S, m_block, n_block, thr_mma, scalars):
        """Each key is seen by a range of rows: a kept one from its partition's compression on, a raw one from its own
        row until then."""
        sink, kept, raw_offset, skipped = scalars[0], scalars[1], scalars[2], scalars[3]
        scores = layout_utils.reshape_acc_to_mn(acc_S, transpose=True)
        places, known = self._places(thr_mma)
        tiles = scalars[4]  # of a head, whose rows begin at 0 again
        rows_before = m_block % tiles * self.tile_m + places[0, 0][1] - known[0, 0][1]
        for c in cutlass.range_constexpr(cute.size(scores.shape[1])):
            entry = n_block * self.tile_n - skipped + places[0, c][0]
            raw = entry - raw_offset
            start, stop = Int32(0), Int32(NEVER)
            if raw >= 0:
                start = raw
                stop = first_row_of(raw // self.lag + 1, lag=self.lag, chunk=self.chunk)
            elif entry >= sink:
                start = Int32(NEVER)
                if kept > 0:
                    start = first_row_of((entry - sink) // kept + 1, lag=self.lag, chunk=self.chunk)
            start -= rows_before
            width = Uint32(stop - rows_before - start)
            for r in cutlass.range_constexpr(cute.size(scores.shape[0])):
                if const_expr(self.unaligned):
                    seen = Uint32(known[r, 0][1] - start) < width
                else:
                    seen = known[r, 0][1] >= start
                scores[r, c] = scores[r, c] if seen else -Float32.inf
