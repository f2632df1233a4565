"""`lrsa.attention.rows` in two Triton kernels, one each way, for keys and values at once.

Each row is written once, by one program: the way back has no atomics, for a token is kept but once.

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


@triton.jit(do_not_specialize=["used", "rows", "skipped", "pieces"])
def _add(  # type: ignore[no-untyped-def]
    key_ptr,  # gradients of rows: [B, H, rows, D]
    value_ptr,
    index_ptr,  # int64 [B, H, used - sink]
    piece_ptr,  # int32 [pieces, 2]: first row and number of rows of each piece before the buffer
    key_out_ptr,  # [B, H, tokens, D]
    value_out_ptr,
    sink,
    used,
    raw_start,
    rows,
    skipped,  # rows before the buffer
    pieces,
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
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = (entry >= sink) & (entry < used)
    picked = tl.load(index_ptr + pair * (used - sink) + entry - sink, mask=kept, other=0)
    token = tl.where(entry < sink, entry.to(tl.int64), picked)

    dim = tl.arange(0, DIM_TILE)[None, :]
    real = (entry < used)[:, None] & (dim < DIM)
    base = pair * rows * DIM
    at = base + (skipped + entry).to(tl.int64)[:, None] * DIM + dim
    key = tl.load(key_ptr + at, mask=real, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + at, mask=real, other=0.0).to(tl.float32)
    for piece in range(pieces):
        first, count = tl.load(piece_ptr + 2 * piece), tl.load(piece_ptr + 2 * piece + 1)
        at = base + (first + entry).to(tl.int64)[:, None] * DIM + dim
        read = real & (entry < count)[:, None]
        key += tl.load(key_ptr + at, mask=read, other=0.0).to(tl.float32)
        value += tl.load(value_ptr + at, mask=read, other=0.0).to(tl.float32)

    before = real & (token >= raw_start)[:, None]
    to = key_out_ptr + batch * key_batch + head * key_head + token[:, None] * key_token + dim
    key += tl.load(to, mask=before, other=0.0).to(tl.float32)
    tl.store(to, key.to(key_out_ptr.dtype.element_ty), mask=real)
    to = value_out_ptr + batch * value_batch + head * value_head + token[:, None] * value_token + dim
    value += tl.load(to, mask=before, other=0.0).to(tl.float32)
    tl.store(to, value.to(value_out_ptr.dtype.element_ty), mask=real)


def gather(key: Tensor, value: Tensor, index: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """See `rows.gather`."""
    key, value, index = _readable(key), _readable(value), index.contiguous()
    batch, heads, _, dim = key.shape
    length = sum(plan.again) + plan.length
    out = [x.new_empty((batch, heads, length, dim)) for x in (key, value)]
    with fused.on(key.device):
        _gather[(-(-length // ROWS), batch * heads)](
            key, value, index, _firsts(plan.again, plan.length, key.device), *out, plan.tokens, plan.sink, plan.used,
            plan.raw_offset, plan.raw_start, length, *key.stride()[:3], *value.stride()[:3], HEADS=heads, DIM=dim,
            DIM_TILE=fused.power_of_2(dim), ROWS=ROWS, PER_BLOCK=KEY_BLOCK, num_warps=4,
        )  # fmt: skip
    return out[0], out[1]


def add(grad_key: Tensor, grad_value: Tensor, out_key: Tensor, out_value: Tensor, index: Tensor, plan: Plan) -> None:
    """What `rows.scatter` adds to its ``of_raw``; ``grad_key``, ``grad_value`` as `gather` made the rows."""
    grad_key, grad_value, index = grad_key.contiguous(), grad_value.contiguous(), index.contiguous()
    batch, heads, rows, dim = grad_key.shape
    if plan.used == 0:
        return
    with fused.on(grad_key.device):
        _add[(-(-plan.used // ROWS), batch * heads)](
            grad_key, grad_value, index, _pieces(plan.again, grad_key.device), out_key, out_value, plan.sink, plan.used,
            plan.raw_start, rows, sum(plan.again), len(plan.again), *out_key.stride()[:3], *out_value.stride()[:3],
            HEADS=heads, DIM=dim, DIM_TILE=fused.power_of_2(dim), ROWS=ROWS, num_warps=4,
        )  # fmt: skip


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
