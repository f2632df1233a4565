"""The rows of keys and values that a block-sparse kernel reads, and their gradients' way back.

Rows are ``[again | sinks | kept | gap | raw | tail]``: the buffer of what is kept begins with the sinks, the raw keys
follow from a whole block on, and in front, where a backward pass wants them, beginnings of the buffer stand once more.
Gap and tail are zeros, for a weight of 0 times NaN is NaN.

B batch, H heads, T tokens, D head dimension, N rows, P partitions of L tokens with K kept.
Fused kernels on CUDA (`rows_kernel`); PyTorch's operators elsewhere, which are the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrsa.attention import fused


class Plan(NamedTuple):
    """Where what stands; ``raw_offset``, ``length`` and each of ``again`` are multiples of `blocks.KEY_BLOCK`.

    Attributes:
        tokens: T.
        sink: S, the first rows of the buffer.
        lag: L.
        kept: K.
        partitions: P, of which K tokens each follow the sinks.
        raw_offset: of the first raw row, counted from the buffer's first.
        raw_start: its token.
        length: N without ``again``.
        again: how much of the buffer's beginning stands in front of it, piece after piece.
    """

    tokens: int
    sink: int
    lag: int
    kept: int
    partitions: int
    raw_offset: int
    raw_start: int
    length: int
    again: tuple[int, ...] = ()

    @property
    def used(self) -> int:
        """Rows of the buffer that hold a token."""
        return self.sink + self.partitions * self.kept

    def without_raw(self) -> Plan:
        """The buffer alone: for a kernel that reads raw keys where they are."""
        return self._replace(length=self.raw_offset)


def gather(key: Tensor, value: Tensor, index: Tensor, plan: Plan, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[B, H, T, D]`` each, ``index [B, H, P * K]`` ascending -> ``[B, H, sum(again) + N, D]`` each.

    ``gate [B, H, P * K]``: a factor of the kept values.
    """
    if gate is None and fused.runs_on(key):
        from lrsa.attention import rows_kernel  # needs triton

        return rows_kernel.gather(key, value, index, plan)
    return gather_one(key, index, plan), gather_one(value, index, plan, gate)


def scatter(
    grad_key: Tensor,
    grad_value: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    plan: Plan,
    gate: Tensor | None = None,
    of_raw: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `gather`'s two results -> those of ``key``, ``value`` and ``gate``, in their dtypes.

    ``of_raw``: for a plan without raw rows the gradients ``[B, H, T, D]`` that the tokens from ``raw_start`` on have as
    such. The others are added to them, in their place. What one token has in several rows of the buffer is added up in
    float32.
    """
    assert plan.raw_start <= plan.sink, "tokens between sinks and raw rows would have no gradient"
    if of_raw is None:
        begin, count = sum(plan.again) + plan.raw_offset, plan.tokens - plan.raw_start
        of_raw = empty_gradient(key), empty_gradient(value)
        for out, grad in zip(of_raw, (grad_key, grad_value), strict=True):
            out[:, :, plan.raw_start :] = grad[:, :, begin : begin + count]
    if gate is None and fused.runs_on(grad_key):
        from lrsa.attention import rows_kernel

        rows_kernel.add(grad_key, grad_value, *of_raw, index, plan)
        return *of_raw, None
    add_one(grad_key, of_raw[0], index, plan)
    return *of_raw, add_one(grad_value, of_raw[1], index, plan, value, gate)


def empty_gradient(x: Tensor) -> Tensor:
    """Laid out as ``x``, but with channels side by side and all else at multiples of 16 bytes, as `hopper` writes."""
    made = torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())
    odd = any(stride == 0 or stride * x.element_size() % 16 for stride in made.stride()[:-1])
    return x.new_empty(x.shape) if odd else made  # of a dimension of size 1, whose stride says nothing


def gather_one(x: Tensor, index: Tensor, plan: Plan, gate: Tensor | None = None) -> Tensor:
    """`gather` of one of them, in PyTorch."""
    batch, heads, _, dim = x.shape
    kept = x.gather(2, _expand(index, dim))
    raw = x[:, :, plan.raw_start :] if plan.length > plan.raw_offset else x[:, :, :0]
    if gate is not None:
        kept = kept * gate[..., None].to(x.dtype)
    gap = x.new_zeros((batch, heads, plan.raw_offset - plan.used, dim))
    tail = x.new_zeros((batch, heads, plan.length - plan.raw_offset - raw.shape[2], dim))
    buffer = [x[:, :, : plan.sink], kept, gap]
    if plan.again:
        buffer = [torch.cat(buffer, 2)]
    return torch.cat([*(buffer[0][:, :, :count] for count in plan.again), *buffer, raw, tail], 2)


def add_one(
    grad: Tensor, out: Tensor, index: Tensor, plan: Plan, x: Tensor | None = None, gate: Tensor | None = None
) -> Tensor | None:
    """`scatter` of one of them, in PyTorch, to ``out`` -> the gradient of ``gate``, a factor of ``x``."""
    *pieces, buffer = grad[:, :, : sum(plan.again) + plan.raw_offset].split([*plan.again, plan.raw_offset], 2)
    wide = torch.promote_types(out.dtype, torch.float32)  # in bfloat16 a key of many pieces would lose the smaller ones
    buffer = buffer.to(wide, copy=bool(pieces))
    for piece in pieces:
        buffer[:, :, : piece.shape[2]] += piece
    positions, kept = _expand(index, out.shape[3]), buffer[:, :, plan.sink : plan.used]
    grad_gate = None
    if gate is not None and x is not None:
        grad_gate = (kept * x.gather(2, positions)).sum(-1, dtype=gate.dtype)
        kept = kept * gate[..., None].to(x.dtype)
    begin = plan.raw_start  # sinks before it are in no raw row too
    out[:, :, :begin] = buffer[:, :, :begin]
    out[:, :, begin : plan.sink] += buffer[:, :, begin : plan.sink]
    # Kept positions are each there but once, so that nothing is lost or added twice.
    out.scatter_(2, positions, (out.gather(2, positions) + kept).to(out.dtype))
    return grad_gate


def _expand(index: Tensor, dim: int) -> Tensor:
    return index[..., None].expand(-1, -1, -1, dim)
