"""`lrsa.attention.rows` in two Triton kernels, one each way, for keys and values at once.

Each row is written once, by one program: the way back has no atomics. A token finds its row in the buffer by a binary
search among the K kept ones of its partition, so that nothing but ``index`` is needed.

Imported by `rows` where `fused.runs_on` says so, for it needs the package triton.
"""

from __future__ import annotations

import functools

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from lrsa.attention import fused
from lrsa.attention.blocks import KEY_BLOCK
from lrsa.attention.rows import Plan

ROWS = 32  # of a program; of a whole number of them a block of rows is made


@triton.jit(do_not_specialize=["tokens", "used", "raw_offset", "length"])
def _gather(  # type: ignore[no-untyped-def]
    key_ptr,
    value_ptr,
    index_ptr,  # int64 [B, H, used - sink]
    first_ptr,  # int32 [length / PER_BLOCK]: the buffer's row, or the one after it, with which a block begins
    key_out_ptr,  # [B, H, length, D]
    value_out_ptr,
    tokens,
    sink,
    used,
    raw_offset,
    raw_start,
    length,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    start = tl.program_id(0) * ROWS
    pair = tl.program_id(1).to(tl.int64)  # of B * H
    batch, head = pair // HEADS, pair % HEADS
    row = start + tl.arange(0, ROWS)
    entry = tl.load(first_ptr + start // PER_BLOCK) + row % PER_BLOCK
    kept = (entry >= sink) & (entry < used)
    picked = tl.load(index_ptr + pair * (used - sink) + entry - sink, mask=kept, other=0).to(tl.int32)
    raw = entry - raw_offset + raw_start
    token = tl.where(entry < sink, entry, tl.where(kept, picked, raw))
    token = token.to(tl.int64)
    filled = (entry < used) | ((entry >= raw_offset) & (raw < tokens))
    dim = tl.arange(0, DIM_TILE)[None, :]
    read, written = filled[:, None] & (dim < DIM), (row < length)[:, None] & (dim < DIM)
    to = (pair * length + row)[:, None] * DIM + dim
    key = tl.load(
        key_ptr + batch * key_batch + head * key_head + token[:, None] * key_token + dim, mask=read, other=0.0
    )
    tl.store(key_out_ptr + to, key, mask=written)
    at = value_ptr + batch * value_batch + head * value_head + token[:, None] * value_token + dim
    tl.store(value_out_ptr + to, tl.load(at, mask=read, other=0.0), mask=written)


@triton.jit(do_not_specialize=["tokens", "partitions", "kept", "raw_row", "length", "skipped", "pieces", "steps"])
def _scatter(  # type: ignore[no-untyped-def]
    key_ptr,  # gradients of rows: [B, H, length, D]
    value_ptr,
    index_ptr,  # int64 [B, H, partitions * kept]
    piece_ptr,  # int32 [pieces, 2]: first row and number of rows of each piece before the buffer
    key_out_ptr,
    value_out_ptr,
    tokens,
    sink,
    lag,
    kept,
    partitions,
    raw_row,  # of the token raw_start
    raw_start,
    length,
    skipped,  # rows before the buffer
    pieces,
    steps,  # that a search among `kept` takes
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)  # of B * H
    batch, head = pair // HEADS, pair % HEADS
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens

    partition = (token - sink) // lag
    ranked = inside & (token >= sink) & (partition < partitions)
    index = index_ptr + pair * (partitions * kept)
    low = tl.where(ranked, partition * kept, 0)
    stop = tl.where(ranked, low + kept, 0)
    high = stop
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        before = tl.load(index + middle, mask=open, other=0).to(tl.int32) < token
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & (before == 0), middle, high)
    found = ranked & (low < stop)
    found = found & (tl.load(index + low, mask=found, other=-1).to(tl.int32) == token)
    buffered = (inside & (token < sink)) | found
    entry = tl.where(token < sink, token, sink + low)

    dim = tl.arange(0, DIM_TILE)[None, :]
    base = pair * length * DIM
    real = dim < DIM
    raw = base + (raw_row + token - raw_start).to(tl.int64)[:, None] * DIM + dim
    has_raw = (inside & (token >= raw_start))[:, None] & real
    key = tl.load(key_ptr + raw, mask=has_raw, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + raw, mask=has_raw, other=0.0).to(tl.float32)
    at = base + (skipped + entry).to(tl.int64)[:, None] * DIM + dim
    read = buffered[:, None] & real
    key += tl.load(key_ptr + at, mask=read, other=0.0).to(tl.float32)
    value += tl.load(value_ptr + at, mask=read, other=0.0).to(tl.float32)
    for piece in range(pieces):
        first, count = tl.load(piece_ptr + 2 * piece), tl.load(piece_ptr + 2 * piece + 1)
        at = base + (first + entry).to(tl.int64)[:, None] * DIM + dim
        read = (buffered & (entry < count))[:, None] & real
        key += tl.load(key_ptr + at, mask=read, other=0.0).to(tl.float32)
        value += tl.load(value_ptr + at, mask=read, other=0.0).to(tl.float32)

    written = inside[:, None] & real
    token = token.to(tl.int64)
    to = key_out_ptr + batch * key_batch + head * key_head + token[:, None] * key_token + dim
    tl.store(to, key.to(key_out_ptr.dtype.element_ty), mask=written)
    to = value_out_ptr + batch * value_batch + head * value_head + token[:, None] * value_token + dim
    tl.store(to, value.to(value_out_ptr.dtype.element_ty), mask=written)


def gather(key: Tensor, value: Tensor, index: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """See `rows.gather`."""
    key, value, index = _readable(key), _readable(value), index.contiguous()
    batch, heads, _, dim = key.shape
    length = sum(plan.again) + plan.length
    out = [x.new_empty((batch, heads, length, dim)) for x in (key, value)]
    with fused.on(key.device):
        _gather[(triton.cdiv(length, ROWS), batch * heads)](
            key, value, index, _firsts(plan.again, plan.length, key.device), *out, plan.tokens, plan.sink, plan.used,
            plan.raw_offset, plan.raw_start, length, *key.stride()[:3], *value.stride()[:3], HEADS=heads, DIM=dim,
            DIM_TILE=triton.next_power_of_2(dim), ROWS=ROWS, PER_BLOCK=KEY_BLOCK, num_warps=4,
        )  # fmt: skip
    return out[0], out[1]


def scatter(
    grad_key: Tensor, grad_value: Tensor, key: Tensor, value: Tensor, index: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """See `rows.scatter`; ``grad_key``, ``grad_value`` contiguous, as `gather` made the rows."""
    grad_key, grad_value, index = grad_key.contiguous(), grad_value.contiguous(), index.contiguous()
    out = [torch.empty_like(_readable(x)) for x in (key, value)]
    batch, heads, tokens, dim = key.shape
    skipped = sum(plan.again)
    partitions = plan.partitions if plan.kept else 0
    with fused.on(key.device):
        _scatter[(triton.cdiv(tokens, ROWS), batch * heads)](
            grad_key, grad_value, index, _pieces(plan.again, key.device), *out, tokens, plan.sink, plan.lag, plan.kept,
            partitions, skipped + plan.raw_offset, plan.raw_start, skipped + plan.length, skipped, len(plan.again),
            plan.kept.bit_length(), *out[0].stride()[:3], *out[1].stride()[:3], HEADS=heads, DIM=dim,
            DIM_TILE=triton.next_power_of_2(dim), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out[0], out[1]


def _readable(x: Tensor) -> Tensor:
    """The kernels walk over channels side by side; all other strides are arguments."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=64)
def _firsts(again: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    pieces = [torch.arange(0, count, KEY_BLOCK, dtype=torch.int32) for count in (*again, length)]
    return torch.cat(pieces).to(device)


@functools.lru_cache(maxsize=64)
def _pieces(again: tuple[int, ...], device: torch.device) -> Tensor:
    begins = [sum(again[:i]) for i in range(len(again))]
    pairs = [(begin, count) for begin, count in zip(begins, again, strict=True)] or [(0, 0)]
    return torch.tensor(pairs, dtype=torch.int32, device=device)
