"""The first S queries, which see one another alone. Block-sparse kernels begin after them, where partitions do.

One fused kernel each way on CUDA (`sinks_kernel`), for they are few, and a dozen of PyTorch's operators take longer to
launch than to run; these elsewhere, and for many sinks.

``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, of which the first S of T are read; outputs and gradients
likewise, of which the others are left alone.
"""

from __future__ import annotations

from torch import Tensor

from lrsa.attention import fused
from lrsa.attention.dense import attend_dense, attend_dense_backward

MOST = 64  # of the fused kernels, whose programs hold S x S weights and a head's sinks at once


def attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, sink: int, scale: float) -> None:
    """Writes to ``out``, as ``query``; ``sink``: S."""
    if _fused(query, sink):
        from lrsa.attention import sinks_kernel  # needs triton

        sinks_kernel.attend(query, key, value, out, sink, scale)
    else:
        query, key, value = (x[:, :, :sink] for x in (query, key, value))
        out[:, :, :sink] = attend_dense(query, key, value, scale)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    sink: int,
    scale: float,
) -> None:
    """Writes to ``grad_query``, and adds to ``grad_key`` and ``grad_value``; ``grad``: of the output."""
    if _fused(query, sink):
        from lrsa.attention import sinks_kernel

        sinks_kernel.backward(grad, query, key, value, grad_query, grad_key, grad_value, sink, scale)
        return
    grad, query, key, value = (x[:, :, :sink] for x in (grad, query, key, value))
    of_query, of_key, of_value = attend_dense_backward(grad, query, key, value, scale)
    grad_query[:, :, :sink] = of_query
    grad_key[:, :, :sink] += of_key
    grad_value[:, :, :sink] += of_value


def _fused(query: Tensor, sink: int) -> bool:
    return fused.runs_on(query) and sink <= MOST
