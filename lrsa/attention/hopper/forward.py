"""The forward pass on Hopper: flash-attn-4's block-sparse kernel, kept on its processor from tile to tile.

The library launches a program for each tile of 128 queries, and reads keys from one tensor, into which all of them must
be copied first. Here a processor holds one program, which walks over its tiles and begins the next while this one ends;
`traffic` loads keys, raw ones from where they are, and stores what is done.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cutlass
import torch
from cutlass import Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned, get_num_sms_for_selection, to_cute_tensor
from flash_attn.cute.softmax import Softmax
from flash_attn.cute.testing import is_fake_mode
from flash_attn.cute.tile_scheduler import SingleTileScheduler
from flash_attn.cute.utils import AuxData
from quack import layout_utils, sm90_utils
from torch import Tensor

from lrsa.attention.blocks import KEY_BLOCK, Layout
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
from lrsa.attention.hopper.tiles import OnGrid, Snake
from lrsa.attention.hopper.traffic import FREE, WRITTEN, Traffic


class Forward(Traffic):
    """The library's kernel over `Snake`'s tiles. Its output has shared memory of its own, beside the queries'.

    It is called as the library's, with raw keys and values as auxiliary tensors, and one scalar more: the blocks of the
    buffer.
    """

    def __init__(self, *args: Any, processors: int, mask: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processors, self.block_mask = processors, mask

    def kernel(self, *args: Any) -> OnGrid:
        *front, params, scheduler, storage, aux_data, _ = args
        assert scheduler is SingleTileScheduler, scheduler
        raw_loads = [
            self._loaded(assume_tensor_aligned(layout_utils.select(x, [1, 3, 2, 0])), memory, dim)
            for x, memory, dim in zip(
                aux_data.tensors, (self.sK_layout, self.sV_layout), (self.tile_hdim, self.tile_hdimv), strict=True
            )
        ]
        atoms, tensors = zip(*raw_loads, strict=True)
        *scalars, buffered = aux_data.scalars
        output, store = args[3], args[13]
        total = params.num_block * params.num_head * params.num_batch
        programs = cutlass.min(Int32(self.processors), total)
        own = Snake.Params(
            params.num_block, params.num_head, total, programs, buffered, output, store, *tensors, *atoms
        )
        return OnGrid(super().kernel(*front, own, Snake, storage, AuxData(None, tuple(scalars)), None), programs)

    def _loaded(self, tensor: Any, memory: Any, dim: int) -> Any:
        operation = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(operation, tensor, cute.select(memory, mode=[0, 1]), (self.tile_n, dim), 1)

    def _get_shared_storage_cls(self) -> Any:
        def memory(count: int) -> Any:
            return cute.struct.Align[cute.struct.MemRange[self.dtype, count], self.buffer_align_bytes]

        def barriers(count: int) -> Any:
            return cute.struct.MemRange[cutlass.Int64, count]

        fields = {
            "mbar_ptr_Q": barriers(2),
            "mbar_ptr_K": barriers(2 * self.num_stages),
            "mbar_ptr_V": barriers(2 * self.num_stages),
            "sV": memory(cute.cosize(self.sV_layout)),
            "sQ": memory(3 * self.tile_m * self.tile_hdim),
            "sK": memory(cute.cosize(self.sK_layout)),
            "sP": memory(0),
        }
        return cute.struct(type("Storage", (), {"__annotations__": fields}))

    @cute.jit
    def mma(
        self,
        tiled_mma_qk,
        tiled_mma_pv,
        mO,
        mLSE,
        sQ,
        sK,
        sVt,
        sP,
        sO,
        learnable_sink,
        pipeline_k,
        pipeline_v,
        pipeline_q,
        gmem_tiled_copy_O,
        tma_atom_O,
        tidx,
        softmax_scale_log2,
        softmax_scale,
        block_info,
        SeqlenInfoCls,
        AttentionMaskCls,
        TileSchedulerCls,
        lists,
        aux_data,
        fastdiv_mods,
    ):
        """As in the library a block's scores are begun together with the output of the block before it, here over the
        edges of tiles too: the next tile's first scores with the last output of this one."""
        group = cute.arch.make_warp_uniform(tidx // self.num_threads_per_warp_group)
        of_groups = cute.make_layout(self.num_wg_mma, stride=self.num_threads_per_warp_group)
        wg_mma_qk, wg_mma_pv = tiled_mma_qk.get_slice(of_groups(group)), tiled_mma_pv.get_slice(of_groups(group))
        _, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(
            wg_mma_qk, (self.tile_m, self.tile_n, self.tile_hdim), self._query_memory(sQ), sK
        )
        scores_of = functools.partial(sm90_utils.gemm_zero_init, tiled_mma_qk, (self.tile_m, self.tile_n), tSrQ, tSrK)
        acc_O, tOrP, tOrVt = sm90_utils.partition_fragment_ABC(
            wg_mma_pv, (self.tile_m, self.tile_hdimv, self.tile_n), sP, sVt
        )
        add_output = functools.partial(sm90_utils.gemm_w_idx, tiled_mma_pv, acc_O, tOrP, tOrVt)
        softmax = Softmax.create(softmax_scale_log2, num_rows=acc_O.shape[0][0] * acc_O.shape[1])
        mask = functools.partial(
            self.block_mask().mask_columns, thr_mma=tiled_mma_qk.get_slice(tidx), scalars=aux_data.scalars
        )
        self.mma_init()

        tiles = TileSchedulerCls()
        work = tiles.initial_work_tile_info()  # there is one for each program
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.num_stages)
        place_of_queries = Int32(0)
        tile, head, row, _ = work.tile_idx
        state = self.first_half_block_overlap(
            lists.mask_block_idx[row, head, tile, lists.mask_block_cnt[row, head, tile] - 1],
            functools.partial(scores_of, A_idx=place_of_queries), state, pipeline_k, tOrP, None, softmax, None,
            mask_fn=functools.partial(mask, m_block=tile), is_first_block=True,
        )  # fmt: skip
        while work.is_valid_tile:
            tile, head, row, _ = work.tile_idx
            masked = lists.mask_block_cnt[row, head, tile]
            masked_index = lists.mask_block_idx[row, head, tile, None]
            step = functools.partial(
                self.mma_one_n_block_intrawg_overlap, mma_qk_fn=functools.partial(scores_of, A_idx=place_of_queries),
                pipeline_k=pipeline_k, pipeline_v=pipeline_v, acc_O=acc_O, tOrP=tOrP, smem_copy_params=None,
                softmax=softmax, seqlen=None,
            )  # fmt: skip
            begun = False
            for place in cutlass.range(1, masked, unroll=1):
                block = masked_index[masked - 1 - place]
                output = functools.partial(add_output, zero_init=not begun)
                state = step(state, block, mma_pv_fn=output, mask_fn=functools.partial(mask, m_block=tile))
                begun = True
            for _ in cutlass.range(lists.full_block_cnt[row, head, tile], unroll=1):
                state = step(state, None, mma_pv_fn=functools.partial(add_output, zero_init=not begun))
                begun = True
            last_output = functools.partial(add_output, zero_init=not begun)
            write = functools.partial(
                self.epilogue, acc_O, mO=mO, mLSE=mLSE, sO=sO, seqlen=SeqlenInfoCls(row), gmem_tiled_copy_O=None,
                tma_atom_O=None, tiled_mma=tiled_mma_pv, tidx=tidx, m_block=tile, head_idx=head, batch_idx=row,
            )  # fmt: skip
            tiles.advance_to_next_work()
            work = tiles.get_current_work()
            place_of_queries ^= 1
            if work.is_valid_tile:
                tile, head, row, _ = work.tile_idx
                block = lists.mask_block_idx[row, head, tile, lists.mask_block_cnt[row, head, tile] - 1]
                state = self.turn(
                    state, functools.partial(scores_of, A_idx=place_of_queries), last_output,
                    functools.partial(mask, m_block=tile, n_block=block), write, pipeline_k, pipeline_v, softmax, acc_O,
                    tOrP,
                )  # fmt: skip
            else:
                state = self.last_half_block_overlap(state, pipeline_v, last_output, zero_init=not begun)
                softmax.rescale_O(acc_O, softmax.finalize())
                write(softmax.row_sum)

    @cute.jit
    def turn(self, state, scores_of, last_output, mask, write, pipeline_k, pipeline_v, softmax, acc_O, tOrP):
        """From a tile to the next: the last output of the one with the first scores of the other."""
        of_values = state.clone()
        state.advance()
        pipeline_k.consumer_wait(state, pipeline_k.consumer_try_wait(state))  # and the queries
        self.warp_scheduler_barrier_sync()
        scores = scores_of(B_idx=state.index, wg_wait=-1)
        pipeline_v.consumer_wait(of_values, pipeline_v.consumer_try_wait(of_values))
        last_output(B_idx=of_values.index, wg_wait=-1)
        self.warp_scheduler_barrier_arrive()
        row_scale = softmax.finalize()
        log_sum = cute.make_fragment_like(softmax.row_sum)
        log_sum.store(softmax.row_sum.load())
        warpgroup.wait_group(1)
        pipeline_k.consumer_release(state)
        mask(scores)
        softmax.online_softmax(scores, is_first=True)
        warpgroup.wait_group(0)
        pipeline_v.consumer_release(of_values)
        softmax.rescale_O(acc_O, row_scale)
        write(log_sum)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), tOrP)
        return state

    @cute.jit
    def epilogue(
        self,
        acc_O,
        lse,
        mO,
        mLSE,
        sO,
        seqlen,
        gmem_tiled_copy_O,
        tma_atom_O,
        tiled_mma,
        tidx,
        m_block,
        head_idx,
        batch_idx,
    ):
        rounded = cute.make_fragment_like(acc_O, self.dtype)
        rounded.store(acc_O.load().to(self.dtype))
        group = cute.arch.make_warp_uniform(tidx // self.num_threads_per_warp_group)
        cute.arch.barrier(barrier_id=FREE + group, number_of_threads=self._free_threads)
        own = self._output_memory(sO)
        atom = utils.get_smem_store_atom(90, self.dtype)
        copy = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(tidx)
        cute.copy(atom, copy.retile(rounded), copy.partition_D(own))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=WRITTEN, number_of_threads=self._written_threads)
        if const_expr(mLSE is not None):
            rows = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
            mine = layout_utils.reshape_acc_to_mn(tiled_mma.get_slice(tidx).partition_C(rows))
            if mine[0][1] == 0:
                log_sum = mLSE[None, head_idx, batch_idx]
                for place in cutlass.range_constexpr(cute.size(mine, mode=[0])):
                    row = m_block * self.tile_m + mine[place, 0][0]
                    if row < seqlen.seqlen_q:
                        log_sum[row] = lse[place]


@on_its_device
def forward(
    query: Tensor,
    buffer: Sequence[Tensor],
    raw: Sequence[Tensor],
    out: Tensor,
    layout: Layout,
    scale: float,
    *,
    with_log_sum: bool,
) -> Tensor | None:
    """``query [B, R, Hq, D]``; keys and values of the ``buffer`` ``[B, raw_offset, H, D]``, and the ``raw`` ones
    ``[B, R, H, D]`` from row 0 on; the output is written to ``out``, as ``query``.

    Returns: the logarithm of the sum of each row's weights, ``[B, Hq, R]`` float32, where it is asked for.
    """
    batch, rows, heads, dim = query.shape
    mask = layout.mask
    key, value = buffer
    query, raw = aligned(query), [aligned(x) for x in raw]
    log_sum = query.new_empty((batch, heads, rows), dtype=torch.float32) if with_log_sum else None
    numbers = mask.sink, mask.kept, mask.raw_offset, mask.skipped, mask.raw_offset // KEY_BLOCK
    lists = expanded(layout.forward, batch, heads)
    tensors = query, key, value, out, *raw
    processors = get_num_sms_for_selection(query.device.index, 90)
    kernel = cached(
        "forward",
        (query.dtype, dim, heads // key.shape[2], mask.lag, mask.chunk, with_log_sum, processors,
         *broadcast(*tensors, *lists)),
        functools.partial(_compile, tensors, log_sum, lists, scalars(*numbers), layout, processors),
    )  # fmt: skip
    if not is_fake_mode():
        kernel(
            query, key, value, out, log_sum, scale, *[None] * 8, (*lists, *[None] * 4),
            AuxData([*raw], scalars(*numbers)), None, None,
        )  # fmt: skip
    return log_sum


def _compile(
    tensors: tuple[Tensor, ...],
    log_sum: Tensor | None,
    lists: tuple[Tensor, ...],
    numbers: tuple[Int32, ...],
    layout: Layout,
    processors: int,
) -> Any:
    query, key = tensors[:2]
    dim, mask = query.shape[-1], layout.mask
    kernel = Forward(
        DTYPES[query.dtype], dim, dim, query.shape[2] // key.shape[2], pack_gqa=False, tile_m=KEY_BLOCK,
        tile_n=KEY_BLOCK, num_stages=2, num_threads=384, processors=processors,
        mask=functools.partial(
            BlockMask, tile_m=KEY_BLOCK, tile_n=KEY_BLOCK, transposed=False, lag=mask.lag, chunk=mask.chunk
        ),
    )  # fmt: skip
    *own, raw_key, raw_value = [to_cute_tensor(x) for x in tensors]
    of_lists = BlockSparseTensors(*(to_cute_tensor(x, assumed_align=4) for x in lists))
    return cute.compile(
        kernel, *own, to_cute_tensor(log_sum, assumed_align=4), 1.0, *[None] * 8, of_lists,
        AuxData([raw_key, raw_value], numbers), None, None, stream(), options=OPTIONS,
    )  # fmt: skip
