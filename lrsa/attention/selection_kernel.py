"""The selection in two Triton kernels: LagKV's deviations, and the K best of each partition.

What one program computes depends on its own partition and lag alone: a prompt read whole, in blocks or token by token
keeps the same tokens. The PyTorch versions (`scorers.lag_relative`, `selection.best`) are the reference.

B batch, H heads, P partitions, L tokens of a partition and of its lag, D head dimension, K kept.
Imported where `fused.runs_on` says so, for it needs the package triton.
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from lrsa.attention import fused

TILE = 4096  # numbers that a program holds at once
WARPS = 2  # of each program, which are many


@triton.jit(do_not_specialize=["partitions", "begin"])
def _deviation(  # type: ignore[no-untyped-def]
    key_ptr,
    value_ptr,
    out_ptr,  # float32 [2, B, H, P, L]
    partitions,
    begin,  # token of the first partition
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # The lag of this partition is the partition of the next program, which runs beside this one: it is read from
    # memory once, and from the L2 cache the second time.
    program = tl.program_id(0).to(tl.int64)  # of B * H * P
    of_values = tl.program_id(1)
    batch, head = program // partitions // HEADS, program // partitions % HEADS
    first = begin + program % partitions * LENGTH
    if of_values == 0:
        base, stride = key_ptr + batch * key_batch + head * key_head + first * key_token, key_token
    else:
        base, stride = value_ptr + batch * value_batch + head * value_head + first * value_token, value_token
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM_TILE)

    lag = base + LENGTH * stride
    low = tl.full([ROWS, DIM_TILE], float("inf"), tl.float32)
    high = tl.full([ROWS, DIM_TILE], -float("inf"), tl.float32)
    for start in tl.range(0, LENGTH, ROWS):
        inside = (start + row < LENGTH)[:, None] & (dim < DIM)[None, :]
        x = tl.load(lag + (start + row)[:, None] * stride + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, -float("inf")))
    least, most = tl.min(low, 0), tl.max(high, 0)
    ranges = most - least >= 1.1754943508222875e-38  # float32's smallest normal number: not where the lag is constant
    factor = tl.where(ranges, 1.0 / tl.where(ranges, most - least, 1.0), 0.0)
    least = tl.where(ranges, least, 0.0)

    out = out_ptr + (of_values * tl.num_programs(0) + program) * LENGTH
    for start in tl.range(0, LENGTH, ROWS):
        token = start + row
        inside = (token < LENGTH)[:, None] & (dim < DIM)[None, :]
        x = tl.load(base + token[:, None] * stride + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        scaled = (x - least[None, :]) * factor[None, :]
        off = tl.where(inside, scaled - (tl.sum(scaled, 1) / DIM)[:, None], 0.0)
        tl.store(out + token, tl.sqrt(tl.sum(off * off, 1) / (DIM - 1)), mask=token < LENGTH)


@triton.jit
def _share(ptr, token, inside):  # type: ignore[no-untyped-def]
    """Softmax over a partition's tokens."""
    x = tl.load(ptr + token, mask=inside, other=-float("inf"))
    weight = tl.exp(x - tl.max(x, 0))
    return weight / tl.sum(weight, 0)


@triton.jit(do_not_specialize=["partitions", "count", "begin", "value_weight"])
def _keep_best(  # type: ignore[no-untyped-def]
    score_ptr,  # float32 [B, H, P, L]: scores; deviations of keys, those of values after them
    out_ptr,  # int64 [B, H, P, K]
    partitions,
    count,
    begin,  # position of the first partition
    value_weight,
    LENGTH: tl.constexpr,
    LENGTH_TILE: tl.constexpr,
    DEVIATIONS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of B * H * P
    base = score_ptr + program * LENGTH
    token = tl.arange(0, LENGTH_TILE)
    inside = token < LENGTH
    if DEVIATIONS:
        score = _share(base, token, inside)
        if WITH_VALUES:
            score += value_weight * _share(base + tl.num_programs(0).to(tl.int64) * LENGTH, token, inside)
    else:
        score = tl.load(base + token, mask=inside, other=0.0)

    # As int32 of the same order; both zeros are equal, and nothing is above NaN, as in PyTorch's sort.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    # The largest number that K tokens reach, bit by bit: 32 comparisons a token, however long the partition.
    least, most = tl.full([], -(2**31), tl.int64), tl.full([], 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = (least + most + 1) >> 1
        enough = tl.sum((inside & (bits >= middle.to(tl.int32))).to(tl.int32), 0) >= count
        least, most = tl.where(enough, middle, least), tl.where(enough, most, middle - 1)
    threshold = least.to(tl.int32)
    above, equal = inside & (bits > threshold), inside & (bits == threshold)
    room = count - tl.sum(above.to(tl.int32), 0)  # for the earliest of those that are equal
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    position = begin + (program % partitions) * LENGTH + token
    tl.store(out_ptr + program * count + place, position, mask=kept)


def deviations(
    key: Tensor, value: Tensor, length: int, partitions: int, begin: int, *, with_values: bool = True
) -> Tensor:
    """How far each token deviates over its channels, scaled by the range of its lag: float32 ``[2, B, H, P, L]``, of
    keys and of values (those without meaning unless ``with_values``).

    ``key``/``value`` ``[B, H, T, D]``; ``length``: L; ``begin``: index of the first partition's first token, after
    which at least ``(partitions + 1) * length`` tokens are there.
    """
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, _, dim = key.shape
    out = torch.empty((2, batch, heads, partitions, length), dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out
    dim_tile = fused.power_of_2(dim)
    rows = max(1, min(fused.power_of_2(length), TILE // dim_tile))
    with fused.on(key.device):
        _deviation[(batch * heads * partitions, 1 + with_values)](
            key, value, out, partitions, begin, *key.stride()[:3], *value.stride()[:3], HEADS=heads, LENGTH=length,
            DIM=dim, DIM_TILE=dim_tile, ROWS=rows, num_warps=WARPS,
        )  # fmt: skip
    return out


def lag_best(
    key: Tensor, value: Tensor, length: int, partitions: int, begin: int, count: int, position: int, value_weight: float
) -> Tensor:
    """Positions that LagKV keeps, ``count`` of each partition, ascending: int64 ``[B, H, P * K]``.

    Arguments as of `deviations`; ``position``: of the first partition's first token; ``value_weight``: 0 leaves the
    values unread.
    """
    found = deviations(key, value, length, partitions, begin, with_values=value_weight != 0)
    return _best(found, found.shape[1:], count, position, value_weight)


def best_positions(scores: Tensor, count: int, position: int) -> Tensor:
    """Positions of the ``count`` highest scores of each partition, the earlier where two are equal, ascending.

    ``scores`` float32 ``[B, H, P, L]``; ``position``: of the first one's token. int64 ``[B, H, P * K]``.
    """
    return _best(scores.contiguous(), scores.shape, count, position, None)


def _best(scores: Tensor, shape: torch.Size, count: int, position: int, value_weight: float | None) -> Tensor:
    *leading, partitions, length = shape
    out = torch.empty((*leading, partitions * count), dtype=torch.int64, device=scores.device)
    if out.numel() == 0:
        return out
    tile = fused.power_of_2(length)
    with fused.on(scores.device):
        _keep_best[(shape.numel() // length,)](
            scores, out, partitions, count, position, float(value_weight or 0), LENGTH=length, LENGTH_TILE=tile,
            DEVIATIONS=value_weight is not None, WITH_VALUES=bool(value_weight), num_warps=WARPS,
        )  # fmt: skip
    return out
