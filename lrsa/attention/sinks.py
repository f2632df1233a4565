"""The first S queries, which see one another alone. Block-sparse kernels begin after them, where partitions do.

One fused kernel each way on CUDA (`sinks_kernel`), for they are few, and a dozen of PyTorch's operators take longer to
launch than to run; these elsewhere, and for many sinks.

``query`` ``[B, Hq, S, D]``, ``key``/``value`` ``[B, H, S, D]``, and gradients likewise: views of longer rows.
"""

from __future__ import annotations

from torch import Tensor

from lrsa.attention import fused
from lrsa.attention.dense import attend_dense, attend_dense_backward

MOST = 64  # of the fused kernels, whose programs hold S x S weights and a head's sinks at once


def attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float) -> None:
    """Writes to ``out``, as ``query``."""
    if _fused(query):
        from lrsa.attention import sinks_kernel  # needs triton

        sinks_kernel.attend(query, key, value, out, scale)
    else:
        out.copy_(attend_dense(query, key, value, scale))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    scale: float,
) -> None:
    """Writes to ``grad_query``, and adds to ``grad_key`` and ``grad_value``; ``grad``: of the output."""
    if _fused(query):
        from lrsa.attention import sinks_kernel

        sinks_kernel.backward(grad, query, key, value, grad_query, grad_key, grad_value, scale)
        return
    of_query, of_key, of_value = attend_dense_backward(grad, query, key, value, scale)
    grad_query.copy_(of_query)
    grad_key += of_key
    grad_value += of_value


def _fused(query: Tensor) -> bool:
    return fused.runs_on(query) and query.shape[2] <= MOST
