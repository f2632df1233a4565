"""Native Sparse Attention (https://arxiv.org/abs/2502.11089) as `fla.ops.nsa` of flash-linear-attention computes it.

A query attends the means of all past blocks, and the keys of the blocks whose means its group of heads likes best; the
first block, the last one and its own are always among them. The third branch of the paper, a sliding window, is left
out: the package sends it through flash-attn 2. Both branches' gates are constant, for they cost nothing to speak of.

Shapes are the package's own: query ``[B, T, Hq, D]``, key and value ``[B, T, H, D]``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrsa.benchmark.block_peers import fla
from lrsa.benchmark.block_peers.blocks import Blocks, match
from lrsa.benchmark.kernels import largest_error
from lrsa.config import BenchConf

SMALLEST_GROUP = 16  # query heads a key/value head: the rows of a tile of its kernels
SIZES = (64, 128, 256)  # the paper's, and larger ones where it would take more blocks than can be sorted
GATE_COUNT = 4  # the package's reference holds all that a query attends, times T
GATE_BLOCKS = 18  # of the gate's tokens: three of the four are given, and the fourth is one of up to fifteen
AGREEMENT = 0.9  # of the blocks that it is free to choose with the float32 reference's; the rest are near ties


def package() -> str:
    return f"fla-core {fla.installed()}"


def obstacle(conf: BenchConf, device: torch.device) -> str | None:
    """Why it cannot run, or None."""
    group, rest = divmod(conf.query_heads, conf.key_value_heads)
    if rest or group < SMALLEST_GROUP or group & (group - 1):
        return (
            f"its kernels want 16, 32, .. query heads a key/value head, query_heads={conf.query_heads} "
            f"key_value_heads={conf.key_value_heads} are {group}: compare all of them at other heads, such as "
            f"query_heads=32 key_value_heads=2"
        )
    return fla.obstacle(conf, device)


def pairs(blocks: Blocks, tokens: int) -> int:
    """Query-key pairs of both branches: chosen keys, and the means of the blocks that lie wholly in the past."""
    past = tokens // blocks.size
    return blocks.pairs(tokens) + past * blocks.size * (past - 1) // 2 + past * (tokens - past * blocks.size + 1)


def matched(wanted: int, tokens: int) -> Blocks:
    """The setting with about ``wanted`` pairs. Its kernel sorts a block's worth of means at a time and keeps half."""
    return match(wanted, tokens, SIZES, _most, lambda blocks: pairs(blocks, tokens))


def _most(size: int) -> int:
    return size // 2


def invalid(blocks: Blocks) -> str | None:
    """What is wrong with a setting that was asked for."""
    if blocks.size < 16 or blocks.size & (blocks.size - 1) or not 3 <= blocks.count <= _most(blocks.size):
        return f"blocks of 16, 32, 64, .. keys, from 3 to half as many of them as one has keys; this is {blocks}"
    return None


def prepare(inputs: tuple[Tensor, ...], blocks: Blocks) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """What is timed, and its own leaves and output gradient, made of the benchmark's (``[B, H, T, D]``)."""
    own = tuple(x.detach().transpose(1, 2).contiguous() for x in inputs)
    query, key, value = (x.requires_grad_() for x in own[:3])
    options = _options(query, key, blocks)
    attend = _functions().parallel_nsa
    return lambda: attend(query, key, value, **options), own


def gate(conf: BenchConf, blocks: Blocks, device: torch.device) -> dict[str, Any]:
    """Output and gradients of one group of heads against the package's own reference in float32, on the same blocks;
    and how many of these its reference would have chosen."""
    blocks = replace(blocks, count=GATE_COUNT)
    tokens, group = GATE_BLOCKS * blocks.size + 37, conf.query_heads // conf.key_value_heads
    generator = torch.Generator().manual_seed(conf.run.seed)
    made = [torch.randn((1, tokens, h, conf.head_dim), generator=generator) for h in (group, 1, 1, group)]
    query, key, value, grad = (x.to(device, getattr(torch, conf.dtype)) for x in made)
    functions = _functions()
    chosen, agreement = _chosen(query, key, value, blocks)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`block_indices` is provided")  # that is what is wanted
            out = attend(*leaves, block_indices=chosen, **_options(leaves[0], leaves[1], blocks))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    exact = results(functions.naive_nsa, torch.float32)
    plain = largest_error(results(functions.naive_nsa, query.dtype), exact)
    error = largest_error(results(functions.parallel_nsa, query.dtype), exact)
    floor = 4 * torch.finfo(query.dtype).eps
    return {
        "error": error,
        "allowed_error": max(2 * plain, floor),
        "selection_agreement": agreement,
        "allowed_agreement": AGREEMENT,
    }


@torch.no_grad()
def _chosen(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> tuple[Tensor, float]:
    """Blocks as its kernel chooses them, ``[B, T, H, count]``, and the share that the float32 reference chooses too."""
    parallel, naive = (importlib.import_module(f"fla.ops.nsa.{name}") for name in ("parallel", "naive"))
    scale, tokens = query.shape[-1] ** -0.5, query.shape[1]
    means = [parallel.mean_pooling(x, blocks.size) for x in (key, value)]
    _, log_sum = parallel.parallel_nsa_compression(
        q=query, k=means[0], v=means[1], TK=tokens, block_size=blocks.size, scale=scale
    )
    counts = _options(query, key, blocks)["block_counts"]
    chosen = parallel.parallel_nsa_topk(
        q=query, k=means[0], TK=tokens, lse=log_sum, block_counts=counts, block_size=blocks.size, scale=scale
    )
    wanted = naive.naive_nsa_topk(query.float(), means[0].float(), blocks.count, blocks.size, scale)
    return chosen, free_agreement(chosen, wanted, blocks.size)


def free_agreement(chosen: Tensor, wanted: Tensor, size: int) -> float:
    """Share of the blocks ``chosen [B, T, H, count]`` that are among ``wanted`` too, of those that were a choice:
    neither the first block, the query's own or the one before it, nor a -1 of a query that has fewer."""
    own = (torch.arange(chosen.shape[1], device=chosen.device) // size)[None, :, None, None]
    plenty = own >= chosen.shape[-1]  # blocks in the past beyond those that are given
    free = (chosen > 0) & (chosen < own - 1) & plenty
    both = (chosen[..., :, None] == wanted[..., None, :]).any(-1)
    return float((both & free).sum() / free.sum())


def _options(query: Tensor, key: Tensor, blocks: Blocks) -> dict[str, Any]:
    half = query.new_full(query.shape[:3], 0.5)
    # A tensor: a plain number that is no power of two would be taken for the next one.
    counts = torch.full(key.shape[:3], blocks.count, dtype=torch.long, device=key.device)
    return {"g_cmp": half.detach(), "g_slc": half.detach(), "block_counts": counts, "block_size": blocks.size}


def _functions() -> Any:
    return importlib.import_module("fla.ops.nsa")
