"""flash-attn-4's two kernels under our block lists, and our mask in its language; imported where it is installed.

Its public function neither writes into memory that is there nor takes other keys in the backward pass, so this calls
what stands behind it, as PyTorch's FlexAttention does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import cutlass
import torch
from cutlass import cute
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd, flash_attn_func
from torch import Tensor

from lrsa.attention.blocks import KEY_BLOCK, Layout, Lists, Mask, visible


def forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, layout: Layout, scale: float, *, with_log_sum: bool
) -> Tensor | None:
    """``query [B, R, Hq, D]``, ``key``/``value`` ``[B, N, H, D]``; the output is written to ``out``, as ``query``.

    Returns: the logarithm of the sum of each row's weights, ``[B, Hq, R]`` float32, where it is asked for.
    """
    with torch.cuda.device(query.device):
        _, log_sum, *_ = _flash_attn_fwd(
            query, key, value, out=out, softmax_scale=scale, return_lse=with_log_sum, pack_gqa=False,
            block_sparse_tensors=_lists(layout.forward, layout), **mask_arguments(layout.mask),
        )  # fmt: skip
    return log_sum


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
    """Gradients: of ``query`` to ``grad_query``; of ``key`` and ``value``, which have the layout's further pieces in
    front, into their own place. A block of keys is read by one processor, which writes its gradient at the end, or
    that is added up elsewhere and copied when all are done."""
    with torch.cuda.device(query.device):
        _flash_attn_bwd(
            query, key, value, out, grad_out, log_sum, dq=grad_query, dk=key, dv=value, softmax_scale=scale,
            block_sparse_tensors=_lists(layout.backward, layout), **mask_arguments(layout.mask_backward),
        )  # fmt: skip


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention, what the sparse one is measured against: ``[B, heads, T, D]`` all, with gradients."""
    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)[0].transpose(1, 2)


def _lists(lists: Lists, layout: Layout) -> BlockSparseTensorsTorch:
    return BlockSparseTensorsTorch(*lists, block_size=(layout.query_block, KEY_BLOCK))


def mask_arguments(mask: Mask) -> dict[str, Any]:
    """Lag and chunk are compiled in, for a division by a number that is known costs little; the rest are arguments, so
    that another length or another K is no other kernel."""
    numbers = mask.sink, mask.kept, mask.raw_offset, mask.skipped
    return {"mask_mod": mask_function(mask.lag, mask.chunk), "aux_scalars": tuple(cutlass.Int32(n) for n in numbers)}


@functools.cache
def mask_function(lag: int, chunk: int) -> Callable[..., object]:
    """`visible` as flash-attn-4 calls it."""

    @cute.jit
    def mask(batch, head, row, column, lengths, tensors, scalars):
        sink, kept, raw_offset, skipped = [utils.scalar_to_ssa(x, cutlass.Int32) for x in scalars]
        return visible(
            row, column, lag=lag, chunk=chunk, sink=sink, kept=kept, raw_offset=raw_offset, skipped=skipped
        )  # fmt: skip

    # The name of what is compiled, in memory and in its cache on the disk. It would look at `mask` alone.
    mask.__cute_hash__ = f"{inspect.getsource(visible)}, lag {lag}, chunk {chunk}"
    return mask
