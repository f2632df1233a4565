"""The backward pass on Hopper: flash-attn-4's block-sparse kernel under our mask, over all heads that share a key.

The library takes a program for each block of keys and head of queries: a block of raw keys, which few queries see, is
hardly begun when it ends, and what the heads of a group add to a key's gradient meets in float32 in memory, to be
cleared before and rounded after. Here a program goes through the queries of the group's heads one after the other, and
writes a key's gradient once. To the library the group looks like one head with that many times the rows. Raw keys are
read, and their gradients written, where they are; to the library there are those of the buffer alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from cutlass import Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from flash_attn.cute.block_sparse_utils import produce_block_sparse_q_loads_bwd_sm90
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned, to_cute_tensor
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.interface import BwdConfig, _bwd_postprocess_convert, _bwd_preprocess, _tile_size_bwd_sm90
from flash_attn.cute.named_barrier import NamedBarrierBwd
from flash_attn.cute.testing import is_fake_mode
from flash_attn.cute.tile_scheduler import SingleTileScheduler
from flash_attn.cute.utils import AuxData
from quack import copy_utils, layout_utils
from quack.cute_dsl_utils import ParamsBase
from torch import Tensor

from lrsa.attention.blocks import Layout
from lrsa.attention.hopper.launch import (
    DTYPES,
    OPTIONS,
    aligned,
    broadcast,
    cached,
    expanded,
    on_its_device,
    scalars,
    stream,
)
from lrsa.attention.hopper.mask import BlockMask
from lrsa.attention.hopper.tiles import OnGrid

# Of the raw keys' columns, which take turns with the buffer's: by themselves they wait for memory, each for queries
# that none beside it reads. The others are the last, short enough to fill what long columns leave at the end.
MIXED = 0.5
CHANNELS = 32  # of which the library's accumulators hold whole multiples


class Columns:
    """A program for each column, group of heads by group: those of the buffer, which are long, in turns with some of
    the raw keys', and the rest of these at the end (`MIXED`).

    With it goes to the warps that load and store what the library's kernel does not hand them: the queries and the
    output's gradient, of all heads of a group, and the raw keys, values and gradients of both.
    """

    @dataclasses.dataclass
    class Params(ParamsBase):
        base: SingleTileScheduler.Params
        columns: Int32
        groups: Int32
        batch: Int32
        buffered: Int32  # columns before the raw keys'
        mixed: Int32  # columns of raw keys that take turns with those of the buffer, of all groups
        tiles: Int32  # of a head
        query: cute.Tensor  # [rows, D, heads of a group, groups, batch]
        grad_out: cute.Tensor
        raw_key: cute.Tensor  # [rows, D, groups, batch]
        raw_value: cute.Tensor
        raw_grad_key: cute.Tensor
        raw_grad_value: cute.Tensor
        load_query: cute.CopyAtom
        load_grad_out: cute.CopyAtom
        load_raw_key: cute.CopyAtom
        load_raw_value: cute.CopyAtom
        store_raw_grad_key: cute.CopyAtom
        store_raw_grad_value: cute.CopyAtom

    @staticmethod
    def create(params: Any, ctx: object = None) -> SingleTileScheduler:
        index, _, _ = cute.arch.block_idx()
        return SingleTileScheduler(
            params.base, place(index, params.columns, params.groups, params.batch, params.buffered, params.mixed)
        )


def mixed_columns(columns: int, buffered: int) -> int:
    """Of a group's raw columns, those after ``buffered``, how many take turns with the buffer's."""
    return min(int(MIXED * (columns - buffered)), buffered)


@cute.jit
def place(index, columns, groups, batch, buffered, mixed):
    """Column, group and row of the batch of a program."""
    first = buffered * groups * batch
    is_raw, of_kind = index % 2, index // 2
    if index >= 2 * mixed:
        is_raw, of_kind = Int32(0), index - mixed
        if index >= first + mixed:
            is_raw, of_kind = Int32(1), index - first
    width, skipped = buffered, Int32(0)
    if is_raw == 1:
        width, skipped = columns - buffered, buffered
    of_all = of_kind // width
    return skipped + of_kind % width, of_all % groups, of_all // groups


class Backward(FlashAttentionBackwardSm90):
    """It is called as the library's for a single head in each group, with the keys of the buffer, and as auxiliary
    tensors queries and the output's gradient ``[B, R, H, G, D]``, raw keys, values, and what their gradients are
    written to, ``[B, R, H, D]``; with one scalar more: the tiles of a head. What stands in the place of queries and
    gradient tells the number of all rows of a group, and is not read."""

    def __init__(self, *args: Any, mask: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block_mask = mask

    def kernel(self, *args: Any) -> OnGrid:
        *front, params, scheduler, storage, aux_data, _, lists, group, sem_q, sem_k, sem_v, left, right = args
        assert scheduler is SingleTileScheduler, scheduler
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        of_queries, of_keys = (self.tile_m, self.tile_hdim), (self.tile_n, self.tile_hdim)
        kinds = (
            (load, self.sQ_layout, of_queries), (load, self.sdO_layout, of_queries), (load, self.sK_layout, of_keys),
            (load, self.sV_layout, of_keys), (store, self.sK_layout, of_keys), (store, self.sV_layout, of_keys),
        )  # fmt: skip
        made = []
        for x, (operation, memory, tile) in zip(aux_data.tensors, kinds, strict=True):
            order = [1, 4, 3, 2, 0] if cute.rank(x) == 5 else [1, 3, 2, 0]
            tensor = assume_tensor_aligned(layout_utils.select(x, order))
            made.append(cpasync.make_tiled_tma_atom(operation, tensor, cute.select(memory, mode=[0, 1]), tile))
        atoms, tensors = zip(*made, strict=True)
        *_, raw_offset, skipped, tiles, mixed = aux_data.scalars
        batch, groups, columns = lists.mask_block_cnt.shape
        own = Columns.Params(
            params, columns, groups, batch, (skipped + raw_offset) // self.tile_n, mixed, tiles, *tensors, *atoms
        )
        aux_data = AuxData(None, aux_data.scalars)
        launcher = super().kernel(
            *front, own, Columns, storage, aux_data, None, lists, group, sem_q, sem_k, sem_v, left, right
        )
        return OnGrid(launcher, columns * groups * batch)

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
        of_column = functools.partial(self.load_column, column, head, row, extra.buffered)

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
            functools.partial(of_column, (mK, extra.raw_key), (tma_atom_K, extra.load_raw_key), sK),
            functools.partial(of_column, (mV, extra.raw_value), (tma_atom_V, extra.load_raw_value), sV),
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
    def load_column(self, column, head, row, buffered, tensors, atoms, memory, tma_bar_ptr):
        """Keys or values: ``tensors`` are those of the buffer and the raw ones, which follow ``buffered`` columns."""
        if column < buffered:
            self._load(tensors[0], atoms[0], memory, column, head, row, tma_bar_ptr)
        else:
            self._load(tensors[1], atoms[1], memory, column - buffered, head, row, tma_bar_ptr)

    def _load(self, tensor, atom, memory, column, head, row, barrier):
        tile = cute.local_tile(tensor[None, None, head, row], (self.tile_n, self.tile_hdim), (column, 0))
        load, _, _ = copy_utils.tma_get_copy_fn(atom, 0, cute.make_layout(1), tile, memory, single_stage=True)
        load(tma_bar_ptr=barrier)

    @cute.jit
    def mma(self, *args, is_dQ_wg=True):
        """The library's, which hands on to `epilogue_dKV` what stands in the place of the keys' gradients."""
        assert len(args) == 34, len(args)  # of the version that is known
        *mmas, mdK, mdV, sem_k, sem_v = args[:8]
        *middle, store_K, store_V = args[8:23]
        *last, _, tiles, aux_data, fastdiv, lists, group = args[23:]
        extra = tiles.args[0]
        FlashAttentionBackwardSm90.mma(
            self, *mmas, (mdK, extra.raw_grad_key, extra.buffered), (mdV, extra.raw_grad_value, extra.buffered), sem_k,
            sem_v, *middle, (store_K, extra.store_raw_grad_key), (store_V, extra.store_raw_grad_value), *last,
            self.block_mask, tiles, aux_data, fastdiv, lists, group, is_dQ_wg=is_dQ_wg,
        )  # fmt: skip

    @cute.jit
    def epilogue_dKV(
        self,
        acc_dV,
        grad_value,
        sV,
        acc_dK,
        grad_key,
        sK,
        seqlen,
        store_key,
        store_value,
        tiled_mma_dK,
        tiled_mma_dV,
        tidx,
        column,
        head,
        row,
        *unused,
    ):
        """The column's gradients, through the memory of its keys and values, to where they belong."""
        written = pipeline.NamedBarrier(barrier_id=int(NamedBarrierBwd.Epilogue), num_threads=self.num_mma_threads)
        written.arrive_and_wait()  # nobody reads keys or values any more
        for grad, memory, mma in ((acc_dV, sV, tiled_mma_dV), (acc_dK, sK, tiled_mma_dK)):
            seen = memory if const_expr(not self.dKV_swapAB) else layout_utils.transpose_view(memory)
            copy, _, _ = copy_utils.get_smem_store_C(
                mma, seen, tidx, transpose=self.dKV_swapAB, position_independent=True
            )
            copy(grad, dst_idx=None)
        cute.arch.fence_view_async_shared()
        written.arrive_and_wait()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:
            self.store_column(column, head, row, grad_value, store_value, sV)
            self.store_column(column, head, row, grad_key, store_key, sK)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def store_column(self, column, head, row, tensors, atoms, memory):
        """The way back of `load_column`."""
        of_buffer, raw, buffered = tensors
        if column < buffered:
            self._store(of_buffer, atoms[0], memory, column, head, row)
        else:
            self._store(raw, atoms[1], memory, column - buffered, head, row)

    def _store(self, tensor, atom, memory, column, head, row):
        tile = cute.local_tile(tensor[None, None, head, row], (self.tile_n, self.tile_hdim), (column, 0))
        store, _, _ = copy_utils.tma_get_copy_fn(atom, 0, cute.make_layout(1), memory, tile, single_stage=True)
        store()


@on_its_device
def backward(
    query: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    buffer: Sequence[Tensor],
    raw: Sequence[Tensor],
    grad_raw: Sequence[Tensor],
    log_sum: Tensor,
    layout: Layout,
    scale: float,
) -> None:
    """Gradients: of ``query [B, R, Hq, D]`` to ``grad_query``; of keys and values of the ``buffer`` ``[B, N, H, D]``,
    which have the layout's further pieces in front, into their own place; of the ``raw`` ones ``[B, R, H, D]`` to
    ``grad_raw``. ``log_sum [B, Hq, R]``, as from the forward pass; the layout is that of groups of Hq / H heads."""
    batch, rows, query_heads, dim = query.shape
    key, value = buffer
    heads = key.shape[2]
    assert layout.group == query_heads // heads, (layout.group, query_heads, heads)
    config = _tile_size_bwd_sm90(dim, dim, False, False, sparse_block_size_q=layout.query_block)
    dtype, wide, fake = DTYPES[query.dtype], -(-dim // CHANNELS) * CHANNELS, is_fake_mode()
    padded = -(-rows // layout.query_block) * layout.query_block  # of a head: whole blocks of the lists

    def accumulator(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    query, grad_out, raw = aligned(query), aligned(grad_out), [aligned(x) for x in raw]
    assert all(aligned(x) is x for x in grad_raw)
    grad_sum = accumulator(batch, query_heads, padded * wide)
    delta, log2_sum = (accumulator(batch, query_heads, padded) for _ in range(2))
    _bwd_preprocess(
        out, grad_out, delta, log_sum, log2_sum, grad_sum, None, None, None, dtype, dim, dim, layout.query_block,
        fake_mode=fake, hdim_multiple_of=CHANNELS,
    )  # fmt: skip

    of_group = [x.view(batch, heads, -1) for x in (log2_sum, delta, grad_sum)]
    unread = of_group[2].view(query.dtype).view(batch, heads, -1, 2 * wide).narrow(3, 0, dim).transpose(1, 2)
    mask = layout.mask_backward
    columns, buffered = layout.backward.partial_count.shape[2], key.shape[1] // config.n_block_size
    mixed = mixed_columns(columns, buffered) * heads * batch
    numbers = mask.sink, mask.kept, mask.raw_offset, mask.skipped, padded // config.m_block_size, mixed
    lists = expanded(layout.backward, batch, heads)
    tensors = unread, key, value, unread, *of_group, key, value
    extra = [*(x.unflatten(2, (heads, -1)) for x in (query, grad_out)), *raw, *grad_raw]
    kernel = cached(
        "backward",
        (query.dtype, dim, mask.lag, mask.chunk, layout.query_block, *broadcast(*tensors, *extra, *lists)),
        functools.partial(_compile, tensors, extra, lists, scalars(*numbers), layout, config),
    )  # fmt: skip
    if not fake:
        kernel(*tensors, scale, *[None] * 9, AuxData(extra, scalars(*numbers)), (*lists, *[None] * 4), None)

    threads = 128 if config.dQ_single_wg else 128 * config.num_wg
    _bwd_postprocess_convert(
        grad_sum, grad_query, scale, None, None, 90, dtype, dim, config.m_block_size, threads, config.AtomLayoutMdQ,
        config.dQ_swapAB, fake_mode=fake, hdim_multiple_of=CHANNELS,
    )  # fmt: skip


def _compile(
    tensors: tuple[Tensor, ...],
    extra: list[Tensor],
    lists: tuple[Tensor, ...],
    numbers: tuple[Int32, ...],
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
        AuxData([to_cute_tensor(x) for x in extra], numbers), of_lists, None, stream(), options=OPTIONS,
    )  # fmt: skip
