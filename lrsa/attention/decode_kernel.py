"""The Triton kernels of `lrsa.attention.decode`: attention of one query a head, split over the slots.

One program reads one share of the filled slots of one key/value head, for the G query heads of its group at once; a
second kernel merges the shares by their log-sum-exps. How many shares there are follows from shapes alone, and where
they begin from ``filled``, on the device: nothing waits for the host, and a captured graph stays right as the cache
grows.

Imported by `decode.attend` alone, for it needs the package triton.
"""

from __future__ import annotations

import functools
import math

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from lrsa.attention import fused

STAGE_BYTES = 32 * 1024  # keys and values of one step of a program's loop; three are on their way at once
RESIDENT = 3  # programs that share a multiprocessor, for the shared memory that they take
MAX_SPLITS = 128
MERGE_BLOCK = 16  # shares that the merging kernel reads at once


# What grows with the cache must not make Triton compile anew where it happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["slots", "splits", "valid_batch"])
def _attend_share(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    valid_ptr,
    filled_ptr,
    out_ptr,  # [B, Hq, D] where there is one share, else float32 [B * H, splits, GROUP, D]
    sum_ptr,  # float32 [B * H, splits, GROUP]: log2 of the sum of the share's exponentials
    slots,
    splits,
    scale_log2,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    valid_batch,
    valid_slot,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SHARE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_FILLED: tl.constexpr,
):
    split = tl.program_id(0)
    row = tl.program_id(1)  # of B * H
    # 64 bits: a large batch of long rows has more elements than 32 can count.
    batch = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)

    count = slots
    if HAS_FILLED:
        count = tl.minimum(tl.load(filled_ptr + batch).to(tl.int32), slots)
    blocks = (count + BLOCK - 1) // BLOCK
    begin = split * blocks // splits * BLOCK
    end = tl.minimum((split + 1) * blocks // splits * BLOCK, count)

    group = tl.arange(0, GROUP_TILE)
    dim = tl.arange(0, DIM_TILE)
    slot = tl.arange(0, BLOCK)
    q_at = q_ptr + batch * q_batch + (head * GROUP + group[:, None]) * q_head + dim[None, :]
    in_tile = (group[:, None] < GROUP) & (dim[None, :] < DIM)
    q = tl.load(q_at, mask=in_tile, other=0.0)
    k_tile = k_ptr + batch * k_batch + head * k_head + slot[:, None] * k_slot + dim[None, :]
    v_tile = v_ptr + batch * v_batch + head * v_head + slot[:, None] * v_slot + dim[None, :]

    top = tl.full([GROUP_TILE], -float("inf"), tl.float32)  # largest logit so far, in base 2
    total = tl.zeros([GROUP_TILE], tl.float32)
    acc = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for start in tl.range(begin, end, BLOCK):
        seen = start + slot < end
        readable = seen[:, None]
        if DIM != DIM_TILE:
            readable = readable & (dim[None, :] < DIM)
        offset = tl.cast(start, tl.int64)
        counts = seen
        if HAS_VALID:
            at = valid_ptr + batch * valid_batch + (offset + slot) * valid_slot
            counts = tl.load(at, mask=seen, other=0) != 0
        k = tl.load(k_tile + offset * k_slot, mask=readable, other=0.0)
        v = tl.load(v_tile + offset * v_slot, mask=readable, other=0.0)
        # ieee: no TF32 for float32
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        logits = tl.where(counts[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if ONE_SHARE:
        at = out_ptr + (row.to(tl.int64) * GROUP + group[:, None]) * DIM + dim[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=in_tile)
    else:
        share = (row.to(tl.int64) * splits + split) * GROUP
        empty = total == 0.0
        log_sum = tl.where(empty, -float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(sum_ptr + share + group, log_sum, mask=group < GROUP)
        # A share with nothing in it is not read by the merging kernel either.
        written = in_tile & (log_sum[:, None] > -float("inf"))
        tl.store(out_ptr + (share + group[:, None]) * DIM + dim[None, :], acc, mask=written)


@triton.jit(do_not_specialize=["splits"])
def _merge_shares(  # type: ignore[no-untyped-def]
    part_ptr,
    sum_ptr,
    out_ptr,
    splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query_head = tl.program_id(0).to(tl.int64)  # of B * Hq
    first = query_head // GROUP * (splits * GROUP) + query_head % GROUP  # of its shares, GROUP apart
    dim = tl.arange(0, DIM_TILE)
    split = tl.arange(0, BLOCK)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DIM_TILE], tl.float32)
    for start in tl.range(0, splits, BLOCK):
        share = first + (start + split) * GROUP
        log_sum = tl.load(sum_ptr + share, mask=start + split < splits, other=-float("inf"))
        full = log_sum > -float("inf")
        part = tl.load(
            part_ptr + share[:, None] * DIM + dim[None, :], mask=full[:, None] & (dim[None, :] < DIM), other=0.0
        )
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(log_sum - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + query_head * DIM + dim, acc.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def attend(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, filled: Tensor | None, scale: float
) -> Tensor:
    """`lrsa.attention.decode.attend` on Triton; the arguments are checked there."""
    batch, heads, slots, dim = key.shape
    group = query.shape[1] // heads
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = torch.empty((batch, query.shape[1], 1, dim), dtype=query.dtype, device=query.device)
    if batch == 0 or slots == 0:
        return out.zero_()
    dim_tile = max(16, fused.power_of_2(dim))
    block = max(16, min(128, STAGE_BYTES // (2 * dim_tile * key.element_size())))
    splits = choose_splits(batch * heads, -(-slots // block), _multiprocessors(query.device))
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty((batch * heads, splits, group, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty((batch * heads, splits, group), dtype=torch.float32, device=query.device)
    marks = query if valid is None else valid.view(torch.uint8)  # any pointer where none is read
    with fused.on(query.device):
        _attend_share[(splits, batch * heads)](
            query,
            key,
            value,
            marks,
            query if filled is None else filled,
            parts,
            sums,
            slots,
            splits,
            scale * math.log2(math.e),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            *((0, 0) if valid is None else valid.stride()),
            HEADS=heads,
            GROUP=group,
            DIM=dim,
            GROUP_TILE=max(16, fused.power_of_2(group)),  # the least that a matrix instruction takes
            DIM_TILE=dim_tile,
            BLOCK=block,
            ONE_SHARE=splits == 1,
            HAS_VALID=valid is not None,
            HAS_FILLED=filled is not None,
            num_warps=4,
            num_stages=3,
        )
        if splits > 1:
            _merge_shares[(batch * query.shape[1],)](
                parts, sums, out, splits, GROUP=group, DIM=dim, DIM_TILE=dim_tile, BLOCK=MERGE_BLOCK, num_warps=4
            )
    return out


def choose_splits(rows: int, blocks: int, multiprocessors: int) -> int:
    """Shares that each of ``rows`` rows of ``blocks`` blocks is cut into: the fewest that keep the device at least 95%
    as busy as the best number would, its last round counted. From shapes alone."""
    resident = RESIDENT * multiprocessors

    def busy(splits: int) -> float:
        programs = rows * splits
        return programs / (-(-programs // resident) * resident)

    most = max(1, min(blocks, MAX_SPLITS))
    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.95 * best)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted: a few, so that tests meet several shares
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
