"""`python -m tests.attention.compile_flash4`: flash-attn-4's Hopper kernels with our mask and lists, without a GPU.

Tensors are fake, so that nothing but the compiler runs. Prints how many forward and backward kernels there are, the
library's and ours.
"""

from __future__ import annotations

import contextlib
import os

os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch._subclasses.fake_tensor import FakeTensorMode

from lrsa.attention import blocks, flash4_kernels
from lrsa.attention.blocks import Lists, Walk
from lrsa.attention.hopper import backward, forward, launch
from lrsa.attention.layout import Geometry


def compile_both(shape: tuple[int, int, int, int, int], rule: tuple[int, int, int, int], walk: Walk) -> None:
    """B, Hq, H, T, D; S, L, K, C. Queries are a part of longer rows, keys are [B, H, N, D] underneath."""
    batch, query_heads, heads, tokens, dim = shape
    sink = rule[0]
    found = blocks.layout(Geometry(*rule), tokens, torch.device("cpu"), walk, 1.0)
    grouped = blocks.layout(Geometry(*rule), tokens, torch.device("cpu"), walk, 1.0, group=query_heads // heads)

    def fake(lists: Lists) -> Lists:
        return Lists(*(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in lists))

    def queries() -> torch.Tensor:
        strides = (tokens * query_heads * dim, query_heads * dim, dim, 1)
        sizes = (batch, tokens - sink, query_heads, dim)
        return torch.empty_strided(sizes, strides, device="cuda", dtype=torch.bfloat16)

    def keys(length: int) -> torch.Tensor:
        return torch.empty((batch, heads, length, dim), device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    with FakeTensorMode():
        layout = found._replace(forward=fake(found.forward), backward=fake(found.backward))
        query, out, grad_out, grad_query = (queries() for _ in range(4))
        rows, pieces = keys(layout.length), keys(layout.length + layout.mask_backward.skipped)
        log_sum = flash4_kernels.forward(query, rows, rows, out, layout, 0.1, with_log_sum=True)
        buffer, raw = keys(layout.mask.raw_offset), keys(tokens - sink)
        forward(query, (buffer, buffer), (raw, raw), out, layout, 0.1, with_log_sum=True)
        grouped = grouped._replace(backward=fake(grouped.backward))
        more = keys(grouped.mask.raw_offset + grouped.mask_backward.skipped)
        backward(query, out, grad_out, grad_query, (more, more), (raw, raw), (raw, raw), log_sum, grouped, 0.1)
        flash4_kernels.backward(query, out, grad_out, grad_query, pieces, pieces, log_sum, layout, 0.1)


if __name__ == "__main__":
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    for shape, rule, walk in [
        ((1, 9, 3, 1500, 64), (16, 128, 32, 128), Walk(1)),
        ((1, 9, 3, 2500, 64), (0, 128, 64, 128), Walk(0)),  # the same kernels
        ((1, 32, 8, 1700, 128), (16, 128, 16, 128), Walk(2, False)),
    ]:
        compile_both(shape, rule, walk)
    caches = _flash_attn_fwd.compile_cache, _flash_attn_bwd.compile_cache, *map(launch.cache, launch.NAMES)
    print(*(len(cache.cache) for cache in caches))
