"""The backward pass on Hopper: flash-attn-4's block-sparse kernel under our mask, over all heads that share a key.

The library takes a program for each block of keys and head of queries: a block of raw keys, which few queries see, is
hardly begun when it ends, and what the heads of a group add to a key's gradient meets in float32 in memory, to be
cleared before and rounded after. Here a program goes through the queries of the group's heads one after the other, and
writes a key's gradient once. To the library the group looks like one head with that many times the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from flash_attn.cute.block_sparse_utils import produce_block_sparse_q_loads_bwd_sm90
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned, to_cute_tensor
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.interface import BwdConfig, _bwd_postprocess_convert, _bwd_preprocess, _tile_size_bwd_sm90
from flash_attn.cute.testing import is_fake_mode
from flash_attn.cute.tile_scheduler import SingleTileScheduler
from flash_attn.cute.utils import AuxData
from quack import copy_utils, layout_utils
from quack.cute_dsl_utils import ParamsBase
from torch import Tensor

from lrsa.attention.blocks import Layout
from lrsa.attention.hopper.launch import DTYPES, OPTIONS, aligned, broadcast, cached, expanded, on_its_device, stream
from lrsa.attention.hopper.mask import BlockMask

CHANNELS = 32  # of which the library's accumulators hold whole multiples


class Columns:
    """A program for each column: those of the buffer first, which are long, group of heads by group, then those of the
    raw keys, so that short ones fill what is left at the end.

    With it go the queries and the output's gradient, of all heads of a group, to the warp that loads them, to which the
    library's kernel hands nothing else.
    """

    @dataclasses.dataclass
    class Params(ParamsBase):
        base: SingleTileScheduler.Params
        buffered: Int32  # columns before the raw keys'
        tiles: Int32  # of a head
        query: cute.Tensor  # [rows, D, heads of a group, groups, batch]
        grad_out: cute.Tensor
        load_query: cute.CopyAtom
        load_grad_out: cute.CopyAtom

    @staticmethod
    def create(params: Any, ctx: object = None) -> SingleTileScheduler:
        return SingleTileScheduler(params.base, _place(params.buffered))


@cute.jit
def _place(buffered):
    """Column, group and row of the batch of this program."""
    (x, y, z), (columns, groups, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    index = x + columns * (y + groups * z)
    first = buffered * groups * cute.arch.grid_dim()[2]
    width, before, skipped = buffered, Int32(0), Int32(0)
    if index >= first:
        width, before, skipped = columns - buffered, first, buffered
    index -= before
    of_all = index // width
    return skipped + index % width, of_all % groups, of_all // groups


class Backward(FlashAttentionBackwardSm90):
    """It is called as the library's for a single head in each group, with queries and the output's gradient as
    auxiliary tensors, ``[B, R, H, G, D]``, and one scalar more: the tiles of a head. What stands in the place of
    queries and gradient tells the number of all rows of a group, and is not read."""

    def __init__(self, *args: Any, mask: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block_mask = mask

    def kernel(self, *args: Any) -> Any:
        *front, params, scheduler, storage, aux_data, _, lists, group, sem_q, sem_k, sem_v, left, right = args
        assert scheduler is SingleTileScheduler, scheduler
        made = [
            cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(),
                assume_tensor_aligned(layout_utils.select(x, [1, 4, 3, 2, 0])),
                cute.select(memory, mode=[0, 1]),
                (self.tile_m, dim),
            )
            for x, memory, dim in zip(
                aux_data.tensors, (self.sQ_layout, self.sdO_layout), (self.tile_hdim, self.tile_hdimv), strict=True
            )
        ]
        atoms, tensors = zip(*made, strict=True)
        *_, raw_offset, skipped, tiles = aux_data.scalars
        own = Columns.Params(params, (skipped + raw_offset) // self.tile_n, tiles, *tensors, *atoms)
        aux_data = AuxData(None, aux_data.scalars)
        return super().kernel(
            *front, own, Columns, storage, aux_data, None, lists, group, sem_q, sem_k, sem_v, left, right
        )

    @cute.jit
    def load(
        self,
        mQ,
        mK,
        mV,
        mdO,
        mLSE,
        mdPsum,
        sQ,
        sK,
        sV,
        sdO,
        sLSE,
        sdPsum,
        tma_atom_Q,
        tma_atom_K,
        tma_atom_V,
        tma_atom_dO,
        pipeline_Q,
        pipeline_dO,
        block_info,
        SeqlenInfoCls,
        TileSchedulerCls,
        blocksparse_tensors,
        qhead_per_kvhead_divmod,
    ):
        one = cute.make_layout(1)
        extra = TileSchedulerCls.args[0]
        column, head, row, _ = TileSchedulerCls().initial_work_tile_info().tile_idx
        gK = cute.local_tile(mK[None, None, head, row], (self.tile_n, self.tile_hdim), (column, 0))
        gV = cute.local_tile(mV[None, None, head, row], (self.tile_n, self.tile_hdimv), (column, 0))
        load_K, _, _ = copy_utils.tma_get_copy_fn(tma_atom_K, 0, one, gK, sK, single_stage=True)
        load_V, _, _ = copy_utils.tma_get_copy_fn(tma_atom_V, 0, one, gV, sV, single_stage=True)

        def of_group(tensor, atom, memory, dim, barriers):
            """Loads a tile of the group's, which is one of its head's."""

            def load_tile(tile, producer_state):
                of_head = tensor[None, None, tile // extra.tiles, head, row]
                tiles = cute.local_tile(of_head, (self.tile_m, dim), (None, 0))
                load_one, _, _ = copy_utils.tma_get_copy_fn(atom, 0, one, tiles, memory)
                copy_utils.tma_producer_copy_fn(load_one, barriers)(tile % extra.tiles, producer_state=producer_state)

            return load_tile

        def of_rows(tensor, memory, barriers):
            rows = cute.local_tile(tensor[None, head, row], (self.tile_m,), (None,))
            return copy_utils.tma_producer_copy_fn(copy_utils.cpasync_bulk_get_copy_fn(rows, memory), barriers)

        produce_block_sparse_q_loads_bwd_sm90(
            blocksparse_tensors,
            row,
            head,
            column,
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.Q_stage),
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.dO_stage),
            pipeline_Q,
            pipeline_dO,
            load_K,
            load_V,
            of_group(extra.query, extra.load_query, sQ, self.tile_hdim, pipeline_Q),
            of_group(extra.grad_out, extra.load_grad_out, sdO, self.tile_hdimv, pipeline_dO),
            of_rows(mLSE, sLSE, pipeline_Q),
            of_rows(mdPsum, sdPsum, pipeline_dO),
            self.tma_copy_bytes["K"],
            self.tma_copy_bytes["V"],
            Q_stage_eq_dO_stage=(self.Q_stage == self.dO_stage),
            q_subtile_factor=self.q_subtile_factor,
            m_block_max=cute.ceil_div(mQ.shape[0], self.tile_m),
        )

    @cute.jit
    def mma(self, *args, is_dQ_wg=True):
        *front, _, tiles, aux_data, fastdiv, lists, group = args
        FlashAttentionBackwardSm90.mma(
            self, *front, self.block_mask, tiles, aux_data, fastdiv, lists, group, is_dQ_wg=is_dQ_wg
        )


@on_its_device
def backward(
    query: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sum: Tensor,
    layout: Layout,
    scale: float,
) -> None:
    """Gradients: of ``query [B, R, Hq, D]`` to ``grad_query``; of ``key`` and ``value`` ``[B, N, H, D]``, which have
    the layout's further pieces in front, into their own place. ``log_sum [B, Hq, R]``, as from the forward pass; the
    layout is that of groups of Hq / H heads."""
    batch, rows, query_heads, dim = query.shape
    heads = key.shape[2]
    assert layout.group == query_heads // heads, (layout.group, query_heads, heads)
    config = _tile_size_bwd_sm90(dim, dim, False, False, sparse_block_size_q=layout.query_block)
    dtype, wide, fake = DTYPES[query.dtype], -(-dim // CHANNELS) * CHANNELS, is_fake_mode()
    padded = -(-rows // layout.query_block) * layout.query_block  # of a head: whole blocks of the lists

    def accumulator(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    query, grad_out = aligned(query), aligned(grad_out)
    grad_sum = accumulator(batch, query_heads, padded * wide)
    delta, log2_sum = (accumulator(batch, query_heads, padded) for _ in range(2))
    _bwd_preprocess(
        out, grad_out, delta, log_sum, log2_sum, grad_sum, None, None, None, dtype, dim, dim, layout.query_block,
        fake_mode=fake, hdim_multiple_of=CHANNELS,
    )  # fmt: skip

    of_group = [x.view(batch, heads, -1) for x in (log2_sum, delta, grad_sum)]
    unread = of_group[2].view(query.dtype).view(batch, heads, -1, 2 * wide).narrow(3, 0, dim).transpose(1, 2)
    mask = layout.mask_backward
    numbers = mask.sink, mask.kept, mask.raw_offset, mask.skipped, padded // config.m_block_size
    scalars = tuple(Int32(n) for n in numbers)
    lists = expanded(layout.backward, batch, heads)
    tensors = unread, key, value, unread, *of_group, key, value
    extra = [x.unflatten(2, (heads, -1)) for x in (query, grad_out)]
    kernel = cached(
        "backward",
        (query.dtype, dim, mask.lag, mask.chunk, layout.query_block, *broadcast(*tensors, *extra, *lists)),
        functools.partial(_compile, tensors, extra, lists, scalars, layout, config),
    )  # fmt: skip
    if not fake:
        kernel(*tensors, scale, *[None] * 9, AuxData(extra, scalars), (*lists, *[None] * 4), None)

    threads = 128 if config.dQ_single_wg else 128 * config.num_wg
    _bwd_postprocess_convert(
        grad_sum, grad_query, scale, None, None, 90, dtype, dim, config.m_block_size, threads, config.AtomLayoutMdQ,
        config.dQ_swapAB, fake_mode=fake, hdim_multiple_of=CHANNELS,
    )  # fmt: skip


def _compile(
    tensors: tuple[Tensor, ...],
    extra: list[Tensor],
    lists: tuple[Tensor, ...],
    scalars: tuple[Int32, ...],
    layout: Layout,
    config: BwdConfig,
) -> Any:
    dim, mask = tensors[1].shape[-1], layout.mask_backward
    kernel = Backward(
        DTYPES[extra[0].dtype], dim, dim, 1, False, is_local=False, deterministic=False, tile_m=config.m_block_size,
        tile_n=config.n_block_size, Q_stage=config.num_stages_Q, dO_stage=config.num_stages_dO,
        PdS_stage=config.num_stages_PdS, SdP_swapAB=config.SdP_swapAB, dKV_swapAB=config.dKV_swapAB,
        dQ_swapAB=config.dQ_swapAB, AtomLayoutMSdP=config.AtomLayoutMSdP, AtomLayoutNdKV=config.AtomLayoutNdKV,
        AtomLayoutMdQ=config.AtomLayoutMdQ, num_threads=(config.num_wg + 1) * 128, mask_mod=BlockMask,
        q_subtile_factor=layout.query_block // config.m_block_size, dQ_single_wg=config.dQ_single_wg,
        mask=functools.partial(
            BlockMask, tile_m=config.m_block_size, tile_n=config.n_block_size, transposed=config.SdP_swapAB,
            lag=mask.lag, chunk=mask.chunk,
        ),
    )  # fmt: skip
    of_lists = BlockSparseTensors(*(to_cute_tensor(x, assumed_align=4) for x in lists))
    return cute.compile(
        kernel, *[to_cute_tensor(x) for x in tensors], 1.0, *[None] * 9,
        AuxData([to_cute_tensor(x) for x in extra], scalars), of_lists, None, stream(), options=OPTIONS,
    )  # fmt: skip
