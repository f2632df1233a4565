"""MoBA, mixture of block attention (https://arxiv.org/abs/2502.13189), as `fla.ops.moba` of flash-linear-attention
computes it: a query attends its own block, and those of the past whose mean key it likes best, head by head.

The package knows no grouped queries: keys and values are repeated to as many heads, as in MoonshotAI's own code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lrsa.benchmark.block_peers import fla, flash
from lrsa.benchmark.block_peers.blocks import Blocks, match
from lrsa.benchmark.kernels import largest_error, make_inputs
from lrsa.config import BenchConf

SIZES = (512, 1024, 2048, 4096)  # the paper's: from 512 at 8k tokens to 4096 at a million
MOST = 12  # blocks a query, as in the paper's largest model: each is a copy of the query in memory
LARGEST_HEAD = 256
GATE = Blocks(3, 256)  # T x T is cheap at its length, and the kernels know no length


def package() -> str:
    return f"fla-core {fla.installed()}, flash attention of {flash.provide(_module())}"


def obstacle(conf: BenchConf, device: torch.device) -> str | None:
    """Why it cannot run, or None."""
    if conf.head_dim % 8 or conf.head_dim > LARGEST_HEAD:
        return f"flash attention needs a head dimension of 8, 16, .. {LARGEST_HEAD}, this is head_dim={conf.head_dim}"
    found = fla.obstacle(conf, device)
    if found is None and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    return found


def pairs(blocks: Blocks, tokens: int) -> int:
    """Query-key pairs; the means that the choice is made by are not attended."""
    return blocks.pairs(tokens)


def matched(wanted: int, tokens: int) -> Blocks:
    """The setting with about ``wanted`` pairs."""
    return match(wanted, tokens, SIZES, lambda size: MOST, lambda blocks: blocks.pairs(tokens))


def invalid(blocks: Blocks) -> str | None:
    """What is wrong with a setting that was asked for."""
    return None if blocks.count > 1 else f"two blocks or more, for one is dense attention in the package; not {blocks}"


def prepare(inputs: tuple[Tensor, ...], blocks: Blocks) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """What is timed, and its own leaves and output gradient, made of the benchmark's (``[B, H, T, D]``)."""
    batch, _, tokens, _ = inputs[0].shape
    own = tuple(x.detach().transpose(1, 2).flatten(0, 1)[None].contiguous() for x in inputs)  # [1, B T, H, D]
    query, key, value = (x.requires_grad_() for x in own[:3])
    group = query.shape[2] // key.shape[2]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    flash.provide(_module())
    attend = _module().parallel_moba

    def function() -> Tensor:
        keys, values = (x.repeat_interleave(group, dim=2) for x in (key, value))
        return attend(query, keys, values, starts, tokens, blocks.size, blocks.count)

    return function, own


def gate(conf: BenchConf, blocks: Blocks, device: torch.device) -> dict[str, Any]:
    """Output and gradients against dense attention under the mask of the rule, in float64; at the size of `GATE`."""
    tokens = (GATE.count + 2) * GATE.size + 37
    inputs = make_inputs(replace(conf, batch_size=min(conf.batch_size, 2)), tokens, device)
    function, own = prepare(inputs, GATE)
    out = function()
    found = [out.detach(), *torch.autograd.grad(out, own[:3], own[3])]
    fast = tuple(x[0].unflatten(0, (-1, tokens)).transpose(1, 2) for x in found)
    mask = visible(inputs[0], inputs[1], GATE)
    exact = _under(mask, tuple(x.double() for x in inputs))
    plain = largest_error(_under(mask, inputs), exact)
    floor = 4 * torch.finfo(inputs[0].dtype).eps
    return {"error": largest_error(fast, exact), "allowed_error": max(2 * plain, floor)}


def visible(query: Tensor, key: Tensor, blocks: Blocks) -> Tensor:
    """``query [B, Hq, T, D]``, ``key [B, H, T, D]`` -> bool ``[B, Hq, T, T]``: which keys it attends (section 2.2)."""
    tokens, size = query.shape[2], blocks.size
    past = (tokens - 1) // size  # blocks that a later query can choose: the last one has none
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    means = key[:, :, : past * size].unflatten(2, (past, size)).mean(3)  # in the keys' dtype, as theirs
    block = torch.arange(tokens, device=query.device) // size
    chooses = torch.arange(past, device=query.device) < block[:, None]  # [T, past]
    scores = (query.float() @ means.float().transpose(2, 3)).masked_fill(~chooses, float("-inf"))
    best = scores.topk(min(blocks.count - 1, past)).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & chooses
    own = block[:, None] == block
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    blockwise = torch.nn.functional.pad(chosen.repeat_interleave(size, dim=-1), (0, tokens - past * size))
    return blockwise | (own & causal)


def _under(mask: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])


def _module() -> Any:
    return importlib.import_module("fla.ops.moba.parallel")
