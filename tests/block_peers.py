"""Stand-ins on the CPU for what only a GPU runs: flash attention of packed rows, and flash-linear-attention itself."""

from __future__ import annotations

import types
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def flash_forward(q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale) -> tuple[Any, ...]:
    """`aten._flash_attention_forward` of packed rows: output ``[Tq, H, D]``, log-sum-exp ``[H, Tq]``, and the rest."""
    outs, sums = [], []
    for rows, keys in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        query, key, value = (x[slice(*at)].transpose(0, 1).double() for x, at in ((q, rows), (k, keys), (v, keys)))
        scores = query @ key.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        outs.append((scores.softmax(-1) @ value).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
        assert query.shape[1] <= max_q and key.shape[1] <= max_k
    nothing = torch.empty(0)
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1).float(), nothing, nothing, nothing


def flash_backward(
    dout, q, k, v, out, log_sum, starts_q, starts_k, max_q, max_k, dropout, causal, state, unused, *, scale
):
    """Gradients under a log-sum-exp from outside: MoBA merges two passes, and each sees the weights of both."""
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for rows, keys in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        query, key, value = (x[slice(*at)].transpose(0, 1).double() for x, at in ((q, rows), (k, keys), (v, keys)))
        result, grad = (x[slice(*rows)].transpose(0, 1).double() for x in (out, dout))
        weights = (query @ key.transpose(1, 2) * scale - log_sum[:, slice(*rows), None].double()).exp()
        if causal:
            weights = weights.tril()
        inner = weights * (grad @ value.transpose(1, 2) - (grad * result).sum(-1, keepdim=True)) * scale
        parts = (rows, inner @ key), (keys, inner.transpose(1, 2) @ query), (keys, weights.transpose(1, 2) @ grad)
        for total, (at, part) in zip(grads, parts, strict=True):
            total[slice(*at)] += part.transpose(0, 1)
    return tuple(total.to(q.dtype) for total in grads)


def nsa_package() -> dict[str, types.ModuleType]:
    """A small `fla.ops.nsa` with the names and arguments of fla-core 0.6.0, in plain PyTorch."""
    parallel, naive = types.ModuleType("fla.ops.nsa.parallel"), types.ModuleType("fla.ops.nsa.naive")
    nsa = types.ModuleType("fla.ops.nsa")

    def pooling(x: Tensor, size: int) -> Tensor:
        padded = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
        sums = padded.unflatten(1, (-1, size)).sum(2)
        counts = torch.full((sums.shape[1],), size)
        counts[-1] = size - (-x.shape[1] % size)
        return sums / counts[:, None, None]

    def scores(q: Tensor, k: Tensor, size: int, scale: float) -> Tensor:  # [B, H, T, blocks], causal
        group = q.shape[2] // k.shape[2]
        found = q.transpose(1, 2) @ k.repeat_interleave(group, 2).transpose(1, 2).transpose(2, 3) * scale
        late = torch.arange(k.shape[1]) >= ((torch.arange(q.shape[1]) + 1) // size)[:, None]
        return found.masked_fill(late, float("-inf"))

    def topk(q: Tensor, k: Tensor, count: int, size: int, scale: float) -> Tensor:
        weights = scores(q, k, size, scale).softmax(-1).nan_to_num(0).unflatten(1, (k.shape[2], -1)).mean(2)
        own, block = (torch.arange(q.shape[1]) // size)[:, None], torch.arange(k.shape[1])
        weights = weights.masked_fill((block == 0) | (block == own) | (block == own - 1), 2.0)
        chosen = weights.masked_fill(block > own, -1.0).topk(count)
        return chosen.indices.masked_fill(chosen.values < 0, -1).transpose(1, 2).int()

    def attend(q, k, v, g_cmp=None, g_slc=None, block_indices=None, block_counts=16, block_size=64) -> Tensor:
        scale, tokens, group = q.shape[-1] ** -0.5, q.shape[1], q.shape[2] // k.shape[2]
        means = [pooling(x, block_size) for x in (k, v)]
        count = int(block_counts.max())
        chosen = topk(q, means[0], count, block_size, scale) if block_indices is None else block_indices
        hit = (chosen.unsqueeze(-1) == torch.arange(means[0].shape[1])).any(3).transpose(1, 2)  # [B, H, T, blocks]
        mask = hit.repeat_interleave(block_size, -1)[..., :tokens].tril().repeat_interleave(group, 1)
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        picked = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        weights = scores(q, means[0], block_size, scale).softmax(-1).nan_to_num(0)
        coarse = weights @ means[1].repeat_interleave(group, 2).transpose(1, 2)
        return picked.transpose(1, 2) * g_slc.unsqueeze(-1) + coarse.transpose(1, 2) * g_cmp.unsqueeze(-1)

    parallel.mean_pooling = pooling  # type: ignore[attr-defined]
    parallel.parallel_nsa_compression = lambda *, q, k, v, TK, block_size, scale: (None, None)  # type: ignore[attr-defined]
    parallel.parallel_nsa_topk = (  # type: ignore[attr-defined]
        lambda *, q, k, TK, lse, block_counts, block_size, scale: topk(q, k, int(block_counts.max()), block_size, scale)
    )
    naive.naive_nsa_topk = topk  # type: ignore[attr-defined]

    def exactly(q, k, v, g_cmp, g_slc, **blocks) -> Tensor:
        return attend(*(x.double() for x in (q, k, v, g_cmp, g_slc)), **blocks).to(q.dtype)

    nsa.parallel_nsa, nsa.naive_nsa = attend, exactly  # type: ignore[attr-defined]
    return {module.__name__: module for module in (nsa, parallel, naive)}
