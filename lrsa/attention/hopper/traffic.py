"""What goes between the GPU's memory and a processor's own in the forward pass on Hopper, by a warp each way.

One loads queries and keys, of tile after tile, as early as there is room; the other writes outputs as they are done.
"""

from __future__ import annotations

import functools

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.utils import LayoutEnum
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from quack import copy_utils, sm90_utils

LOAD_WARP, STORE_WARP = 0, 1
# Barriers by number, of which the library's kernel uses 2 to 4: an output is there, its memory is free for each group.
WRITTEN, FREE = 1, 5


class Traffic(FlashAttentionForwardSm90):
    """The library's kernel with these two warps. Queries have memory for two tiles, outputs some of their own."""

    @property
    def _free_threads(self) -> int:
        return self.num_threads_per_warp_group + cute.arch.WARP_SIZE

    @property
    def _written_threads(self) -> int:
        return self.num_mma_threads + cute.arch.WARP_SIZE

    def _query_memory(self, first: cute.Tensor) -> cute.Tensor:
        """Of two tiles, ``first`` that of the one."""
        layout = sm90_utils.make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, (self.tile_m, self.tile_hdim), 2)
        return cute.make_tensor(first.iterator, layout.outer)

    def _output_memory(self, query_memory: cute.Tensor) -> cute.Tensor:
        """Behind the queries', of the same arrangement, for keys and values have one head dimension."""
        return cute.make_tensor(query_memory.iterator + 2 * self.tile_m * self.tile_hdim, query_memory.layout)

    @cute.jit
    def load(
        self,
        mQ,
        mK,
        mV,
        sQ,
        sK,
        sV,
        tma_atom_Q,
        tma_atom_K,
        tma_atom_V,
        pipeline_k,
        pipeline_v,
        pipeline_q,
        gmem_tiled_copy_Q,
        mPageTable,
        blocksparse_tensors,
        block_info,
        SeqlenInfoCls,
        TileSchedulerCls,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            self.load_tiles(
                mQ, mK, mV, sQ, sK, sV, tma_atom_Q, tma_atom_K, tma_atom_V, pipeline_k, pipeline_v,
                blocksparse_tensors, TileSchedulerCls,
            )  # fmt: skip
        if warp == STORE_WARP:
            self.store_tiles(self._output_memory(sQ), TileSchedulerCls)

    @cute.jit
    def load_tiles(
        self,
        mQ,
        mK,
        mV,
        sQ,
        sK,
        sV,
        tma_atom_Q,
        tma_atom_K,
        tma_atom_V,
        pipeline_k,
        pipeline_v,
        lists,
        TileSchedulerCls,
    ):
        """The keys of each block before the values of the one before it, from tile to tile without a gap.

        Queries come with their tile's first keys. The memory they go to is that of the last tile but one, whose scores
        are done where the place of these keys is free: it was that of the keys two blocks before.
        """
        key_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.num_stages)
        value_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.num_stages)
        tiles = TileSchedulerCls()
        extra = tiles.params
        keys = functools.partial(
            self.load_block, pipeline_k, (mK, extra.raw_key), (tma_atom_K, extra.load_raw_key), sK, extra.buffered
        )
        values = functools.partial(
            self.load_block, pipeline_v, (mV, extra.raw_value), (tma_atom_V, extra.load_raw_value), sV, extra.buffered
        )
        queries = self._query_memory(sQ)
        place_of_queries, block, head_of_block, row_of_block = Int32(0), Int32(-1), Int32(0), Int32(0)
        work = tiles.initial_work_tile_info()
        while work.is_valid_tile:
            tile, head, row, _ = work.tile_idx
            masked = lists.mask_block_cnt[row, head, tile]
            count = masked + lists.full_block_cnt[row, head, tile]
            masked_index = lists.mask_block_idx[row, head, tile, None]
            full_index = lists.full_block_idx[row, head, tile, None]
            head_kv = head // self.qhead_per_kvhead

            first = masked_index[masked - 1]  # there is one: a tile sees no more than itself of its own keys
            pipeline_k.producer_acquire(key_state, extra_tx_count=self.tma_copy_bytes["Q"])
            gQ = cute.local_tile(mQ[None, None, head, row], (self.tile_m, self.tile_hdim), (None, 0))
            load_Q, _, _ = copy_utils.tma_get_copy_fn(tma_atom_Q, 0, cute.make_layout(1), gQ, queries)
            load_Q(tile, place_of_queries, tma_bar_ptr=pipeline_k.producer_get_barrier(key_state))
            keys(head_kv, row, first, key_state)
            key_state.advance()
            if block >= 0:
                pipeline_v.producer_acquire(value_state)
                values(head_of_block, row_of_block, block, value_state)
                value_state.advance()
            block, head_of_block, row_of_block = first, head_kv, row

            for place in cutlass.range(1, count, unroll=1):
                following = Int32(0)
                if place < masked:
                    following = masked_index[masked - 1 - place]
                else:
                    following = full_index[count - 1 - place]
                pipeline_k.producer_acquire(key_state)
                keys(head_kv, row, following, key_state)
                key_state.advance()
                pipeline_v.producer_acquire(value_state)
                values(head_kv, row, block, value_state)
                value_state.advance()
                block = following
            place_of_queries ^= 1
            tiles.advance_to_next_work()
            work = tiles.get_current_work()
        pipeline_v.producer_acquire(value_state)
        values(head_of_block, row_of_block, block, value_state)
        value_state.advance()
        pipeline_v.producer_tail(value_state)

    @cute.jit
    def load_block(self, barriers, tensors, atoms, memory, buffered, head, row, block, state):
        """A block of the buffer or, from ``buffered`` on, of the raw keys or values."""
        if block < buffered:
            self.load_one(barriers, tensors[0], atoms[0], memory, head, row, block, state)
        else:
            self.load_one(barriers, tensors[1], atoms[1], memory, head, row, block - buffered, state)

    @cute.jit
    def load_one(self, barriers, tensor, atom, memory, head, row, block, state):
        blocks = cute.local_tile(tensor[None, None, head, row], (self.tile_n, self.tile_hdim), (None, 0))
        load, _, _ = copy_utils.tma_get_copy_fn(atom, 0, cute.make_layout(1), blocks, memory)
        copy_utils.tma_producer_copy_fn(load, barriers)(block, producer_state=state)

    @cute.jit
    def store_tiles(self, sO, TileSchedulerCls):
        """Each output, as soon as both groups have written it, and the next one when this one has been read."""
        tiles = TileSchedulerCls()
        output, atom = tiles.params.output, tiles.params.store
        work = tiles.initial_work_tile_info()
        while work.is_valid_tile:
            tile, head, row, _ = work.tile_idx
            gO = cute.local_tile(output[None, None, head, row], (self.tile_m, self.tile_hdimv), (tile, 0))
            store, _, _ = copy_utils.tma_get_copy_fn(atom, 0, cute.make_layout(1), sO, gO, single_stage=True)
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            for group in cutlass.range_constexpr(self.num_wg_mma):
                cute.arch.barrier_arrive(barrier_id=FREE + group, number_of_threads=self._free_threads)
            cute.arch.barrier(barrier_id=WRITTEN, number_of_threads=self._written_threads)
            store()
            cute.arch.cp_async_bulk_commit_group()
            tiles.advance_to_next_work()
            work = tiles.get_current_work()
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # before the program's memory goes
