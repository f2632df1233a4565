"""Attention of one query a head over a cache: what a decode step spends its time on.

B rows, Hq query heads, H key/value heads, G = Hq / H query heads that share keys, N slots, D head dimension. Softmax
does not care for the order of keys, so the cache may hold them in any slots: ``valid`` and ``filled`` say which count.

Two backends of one function. ``triton`` (CUDA, `lrsa.attention.decode_kernel`) reads each key once for the G heads that
share it and waits for nothing, so that one CUDA graph serves every length. ``sdpa`` is PyTorch's own attention under a
mask: the CPU's path, and float64's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lrsa.attention.fused import has_triton, interpreted

BACKENDS = ("auto", "triton", "sdpa")
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads that share keys: rows of one tile


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    filled: Tensor | None,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of ``query`` over the slots that count.

    Args:
        query: ``[B, Hq, 1, D]``, bfloat16, float16 or float32 (never TF32); float64 on ``sdpa``.
        key, value: ``[B, H, N, D]`` in query's dtype, any strides as long as D is contiguous. Slots that do not count
            may hold any finite numbers: make storage with zeros, for 0 * NaN is NaN.
        valid: bool ``[B, N]``, which slots count; None: all.
        filled: int32 ``[B]``: no slot from there on counts, and none is read; None: N.
        scale: of the logits.
        backend: ``triton``, ``sdpa``, or ``auto``: triton where it runs (`obstacle`).

    Returns:
        ``[B, Hq, 1, D]`` in query's dtype; zeros in rows of which no slot counts. No gradient.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, an unknown backend, or one that cannot run here and why.
    """
    _check(query, key, value, valid, filled)
    if choose_backend(backend, query, key) == "triton":
        from lrsa.attention import decode_kernel  # needs triton, which a CPU build of torch does not bring along

        return decode_kernel.attend(query, key, value, valid, filled, scale)
    return _sdpa(query, key, value, valid, filled, scale)


def choose_backend(backend: str, query: Tensor, key: Tensor) -> str:
    """``auto`` resolved: what `attend` runs for such tensors (their shapes, dtype and device count, no values).

    Raises:
        ValueError: an unknown backend, or one that cannot run here and why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    reason = obstacle(query, key)
    if backend == "triton" and reason:
        raise ValueError(f"backend='triton' cannot run here: {reason}; use 'sdpa' or 'auto'")
    if backend == "auto":
        # Under the interpreter the kernel runs on a CPU too, thousands of times slower: for tests that ask for it.
        return "sdpa" if reason or query.device.type != "cuda" else "triton"
    return backend


def obstacle(query: Tensor, key: Tensor) -> str | None:
    """Why the Triton kernel cannot run on these tensors, or None."""
    if not has_triton():
        return "the package triton is not installed"
    if query.device.type != "cuda" and not interpreted():
        return f"the kernel runs on CUDA, the tensors are on {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes bfloat16, float16 and float32, this is {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"the kernel takes head dimensions up to {MAX_HEAD_DIM}, this is {query.shape[-1]}"
    if query.shape[1] // key.shape[1] > MAX_GROUP:
        return f"the kernel takes up to {MAX_GROUP} query heads a key head, this is {query.shape[1] // key.shape[1]}"
    return None


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, filled: Tensor | None, scale: float
) -> Tensor:
    """PyTorch's attention; the heads of a group are rows of one query, so that keys are not copied for each of them."""
    batch, heads, slots, _ = key.shape
    if filled is not None:
        if key.device.type == "cpu":  # nothing waits for a device there: leave out what no row holds
            slots = int(filled.max().clamp(0, slots)) if batch else slots
            key, value = key[:, :, :slots], value[:, :, :slots]
            valid = None if valid is None else valid[:, :slots]
        below = torch.arange(slots, device=key.device) < filled[:, None]
        valid = below if valid is None else valid & below
    if slots == 0:
        return torch.zeros_like(query)
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G, D]
    if valid is None:
        return scaled_dot_product_attention(rows, key, value, scale=scale).reshape(query.shape)
    some = valid.any(-1)
    bias = rows.new_zeros((batch, 1, 1, slots))
    bias.masked_fill_(~(valid | ~some[:, None])[:, None, None], -torch.inf)  # a row of -inf alone has no softmax
    out = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    return out.masked_fill(~some[:, None, None, None], 0).reshape(query.shape)


def _check(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, filled: Tensor | None) -> None:
    if query.ndim != 4 or query.shape[2] != 1:
        raise ValueError(f"query must be [B, Hq, 1, D], one token a row, not {tuple(query.shape)}")
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(f"key and value must be [B, H, N, D], not {tuple(key.shape)} and {tuple(value.shape)}")
    batch, heads, slots, dim = key.shape
    if (query.shape[0], query.shape[3]) != (batch, dim) or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}: B and D must be equal, Hq a multiple of H"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if dim > 1 and (key.stride(-1) != 1 or value.stride(-1) != 1):
        raise ValueError(f"D must be contiguous, strides are {key.stride()} and {value.stride()}")
    if valid is not None and (valid.shape != (batch, slots) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [B, N] = {(batch, slots)}, not {valid.dtype} {tuple(valid.shape)}")
    if filled is not None and (filled.shape != (batch,) or filled.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"filled must be int32 [B] = {(batch,)}, not {filled.dtype} {tuple(filled.shape)}")
