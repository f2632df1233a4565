"""Dense attention as good as it gets over transformers' static cache: the rival of sparse decoding.

transformers' own attention reads a static cache under a mask, which leaves PyTorch no fast kernel. Here a decode step
goes through `lrsa.attention.decode`, the very kernel of the sparse cache, and a prompt through the fastest causal
kernel of PyTorch. For the benchmark alone: a prompt must be fed in one pass, without pads.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lrsa.attention import decode
from lrsa.attention.huggingface import register

NAME = "lrsa_benchmark_dense"
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class _State:
    """What the layers of a pass share: the prompt's kernel, and how many slots a step sees."""

    prefill: SDPBackend | None = None  # None: PyTorch's choice
    filled: Tensor | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in the order of transformers' sdpa: kvpress, which wraps all attentions, passes it by place
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``key``, ``value`` are the whole storage ``[B, H, N, D]``."""
    if attention_mask is not None:
        raise ValueError("the benchmark's dense attention has no pads: leave attention_mask out")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1:
        if module.layer_idx == 0 or _State.filled is None:
            _State.filled = (kwargs["position_ids"][:, -1] + 1).expand(len(query)).to(torch.int32)
        out = decode.attend(query, key, value, None, _State.filled, scale)
    else:
        out = _causal(query, key[:, :, : query.shape[2]], value[:, :, : query.shape[2]], scale, _State.prefill)
    return out.transpose(1, 2).contiguous(), None


def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: none is made, but pads do not go unnoticed."""
    return attention_mask


def use_prefill_kernel(name: str) -> None:
    """The kernel of prompts from now on: a key of `KERNELS`, or ``sdpa`` for PyTorch's choice."""
    _State.prefill = KERNELS.get(name)


def fastest_prefill_kernel(query_heads: int, heads: int, dim: int, length: int, like: Tensor) -> str:
    """Which causal kernel is the fastest on a prompt of ``length`` tokens: a key of `KERNELS`, or ``sdpa``."""
    if like.device.type != "cuda":
        return "sdpa"
    shapes = [(1, query_heads, length, dim), *[(1, heads, length + 64, dim)] * 2]  # cut from a longer storage, as there
    query, key, value = (like.new_empty(shape).normal_()[:, :, :length] for shape in shapes)
    seconds: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        try:
            for _ in range(2):  # the first one compiles
                torch.cuda.synchronize(like.device)
                begin = time.perf_counter()
                _causal(query, key, value, dim**-0.5, kernel)
                torch.cuda.synchronize(like.device)
                seconds[name] = time.perf_counter() - begin
        except torch.OutOfMemoryError:  # a rival less would flatter the others
            raise
        except RuntimeError:  # not built in, or not for this shape and dtype
            seconds.pop(name, None)
    return min(seconds, key=lambda name: seconds[name]) if seconds else "sdpa"


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: SDPBackend | None) -> Tensor:
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


register(NAME, attention, mask)
