"""The selection in two Triton kernels: LagKV's scores, and the K best of each partition.

One program a partition, which computes the same whatever stands beside it: a prompt read whole, in blocks or token by
token keeps the same tokens. The PyTorch versions (`scorers.lag_relative`, `selection.best`) are the reference.

B batch, H heads, P partitions, L tokens of a partition and of its lag, D head dimension, K kept.
Imported where `fused.runs_on` says so, for it needs the package triton.
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from lrsa.attention import fused

TILE = 8192  # float32 numbers that a program holds at once


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    x_ptr,
    lag_ptr,
    x_token,
    lag_token,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Softmax over the tokens of how far each deviates over its channels, scaled by the lag's range: a number a token,
    ``[BLOCKS, BLOCK]``, zeros beyond the last."""
    row = tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_TILE)
    low = tl.full([DIM_TILE], float("inf"), tl.float32)
    high = tl.full([DIM_TILE], -float("inf"), tl.float32)
    for start in tl.range(0, LENGTH, BLOCK):
        token = start + row
        inside = (token < LENGTH)[:, None] & (dim < DIM)[None, :]
        x = tl.load(lag_ptr + token[:, None] * lag_token + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, x, -float("inf")), 0))
    ranges = high > low  # false where the lag is constant, and beyond D
    factor = tl.where(ranges, 1.0 / tl.where(ranges, high - low, 1.0), 0.0)
    shift = tl.where(ranges, low, 0.0)

    found = tl.full([BLOCKS, BLOCK], -float("inf"), tl.float32)
    block = tl.arange(0, BLOCKS)
    for start in tl.range(0, LENGTH, BLOCK):
        token = start + row
        inside = (token < LENGTH)[:, None] & (dim < DIM)[None, :]
        x = tl.load(x_ptr + token[:, None] * x_token + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        scaled = (x - shift[None, :]) * factor[None, :]
        off = tl.where(inside, scaled - (tl.sum(scaled, 1) / DIM)[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(off * off, 1) / (DIM - 1))
        deviation = tl.where(token < LENGTH, deviation, -float("inf"))
        found = tl.where(block[:, None] == start // BLOCK, deviation[None, :], found)
    weight = tl.exp(found - tl.max(found))
    return weight / tl.sum(weight)


@triton.jit(do_not_specialize=["partitions", "value_weight"])
def _score_partition(  # type: ignore[no-untyped-def]
    key_ptr,
    lag_key_ptr,
    value_ptr,
    lag_value_ptr,
    out_ptr,  # float32 [B, H, P, L]
    partitions,
    value_weight,
    key_batch,
    key_head,
    key_partition,
    key_token,
    lag_key_batch,
    lag_key_head,
    lag_key_partition,
    lag_key_token,
    value_batch,
    value_head,
    value_partition,
    value_token,
    lag_value_batch,
    lag_value_head,
    lag_value_partition,
    lag_value_token,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of B * H * P
    partition = program % partitions
    batch = program // partitions // HEADS
    head = program // partitions % HEADS
    score = _shares(
        key_ptr + batch * key_batch + head * key_head + partition * key_partition,
        lag_key_ptr + batch * lag_key_batch + head * lag_key_head + partition * lag_key_partition,
        key_token, lag_key_token, LENGTH, DIM, DIM_TILE, BLOCK, BLOCKS,
    )  # fmt: skip
    if WITH_VALUES:
        score += value_weight * _shares(
            value_ptr + batch * value_batch + head * value_head + partition * value_partition,
            lag_value_ptr + batch * lag_value_batch + head * lag_value_head + partition * lag_value_partition,
            value_token, lag_value_token, LENGTH, DIM, DIM_TILE, BLOCK, BLOCKS,
        )  # fmt: skip
    token = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + program * LENGTH + token, score, mask=token < LENGTH)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """float32 as int32 of the same order. Both zeros are equal, and nothing is above NaN, as in PyTorch's sort."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["partitions", "count", "begin"])
def _keep_best(  # type: ignore[no-untyped-def]
    score_ptr,  # float32 [B, H, P, L]
    out_ptr,  # int64 [B, H, P, K]
    partitions,
    count,
    begin,
    LENGTH: tl.constexpr,
    LENGTH_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of B * H * P
    base = score_ptr + program * LENGTH
    token = tl.arange(0, LENGTH_TILE)
    inside = token < LENGTH
    own = _ordered(tl.load(base + token, mask=inside, other=0.0))
    rank = tl.zeros([LENGTH_TILE], tl.int32)  # tokens that come before this one
    for start in tl.range(0, LENGTH, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = _ordered(tl.load(base + other, mask=other < LENGTH, other=0.0))
        equal = (theirs[None, :] == own[:, None]) & (other[None, :] < token[:, None])
        before = ((theirs[None, :] > own[:, None]) | equal) & (other < LENGTH)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    kept = inside & (rank < count)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    position = begin + (program % partitions) * LENGTH + token
    tl.store(out_ptr + program * count + place, position, mask=kept)


def lag_scores(key: Tensor, lag_key: Tensor, value: Tensor, lag_value: Tensor, value_weight: float) -> Tensor:
    """LagKV's scores of ``[B, H, P, L, D]`` tokens, given as many of their lags: float32 ``[B, H, P, L]``.

    ``value_weight``: 0 leaves the values unread.
    """
    batch, heads, partitions, length, dim = key.shape
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (key, lag_key, value, lag_value)]
    out = torch.empty(key.shape[:-1], dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out
    dim_tile = triton.next_power_of_2(dim)
    block = max(1, min(triton.next_power_of_2(length), TILE // dim_tile))
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    with fused.on(key.device):
        _score_partition[(batch * heads * partitions,)](
            *tensors, out, partitions, float(value_weight), *strides, HEADS=heads, LENGTH=length,
            DIM=dim, DIM_TILE=dim_tile, BLOCK=block, BLOCKS=triton.next_power_of_2(triton.cdiv(length, block)),
            WITH_VALUES=value_weight != 0, num_warps=8 if length > block else 4,
        )  # fmt: skip
    return out


def best_positions(scores: Tensor, count: int, begin: int) -> Tensor:
    """Positions of the ``count`` highest scores of each partition, the earlier where two are equal, ascending.

    ``scores`` float32 ``[B, H, P, L]``; ``begin``: position of the first one's token. int64 ``[B, H, P * K]``.
    """
    scores = scores.contiguous()
    *leading, partitions, length = scores.shape
    out = torch.empty((*leading, partitions * count), dtype=torch.int64, device=scores.device)
    if out.numel() == 0:
        return out
    tile = triton.next_power_of_2(length)
    with fused.on(scores.device):
        _keep_best[(scores.numel() // length,)](
            scores, out, partitions, count, begin, LENGTH=length, LENGTH_TILE=tile,
            BLOCK=max(1, min(tile, TILE // tile)), num_warps=4,
        )  # fmt: skip
    return out
