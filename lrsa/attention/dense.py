"""Causal attention over all keys there are, on PyTorch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LONGEST_SPAN = 256  # queries a call that needs a mask, which then stays small


def attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]`` -> ``[B, Hq, T, D]``."""
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def attend_dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``query``, ``key`` and ``value`` for that of `attend_dense`'s output, for few tokens: O(T^2) memory,
    float32, and without autograd, which operators cannot use."""
    heads, tokens = key.shape[1:3]
    kind = torch.promote_types(query.dtype, torch.float32)
    grad, q = (x.to(kind).unflatten(1, (heads, -1)) for x in (grad, query))  # [B, H, G, T, D]
    k, v = (x.to(kind)[:, :, None] for x in (key, value))
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    with torch.autocast(query.device.type, enabled=False):
        weights = (scale * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
        grad_weights = grad @ v.mT
        grad_logits = scale * weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        grad_query = grad_logits @ k
        grad_key, grad_value = (grad_logits.mT @ q).sum(2), (weights.mT @ grad).sum(2)
    return grad_query.flatten(1, 2).to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def attend_last(query: Tensor, key: Tensor, value: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
    """The queries of the last T of N keys, each of which sees all before the T, and causally those among them.

    Args:
        query: ``[B, Hq, T, D]``. key, value: ``[B, H, N, D]``.
        real: bool ``[B, N]``, False at pads, which are not seen; None: there are none.

    Returns:
        ``[B, Hq, T, D]``; zeros at pads.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if real is None and tokens == keys:
        return attend_dense(query, key, value, scale)
    heads, device = key.shape[1], key.device
    done = []
    for start in range(0, tokens, LONGEST_SPAN):
        stop = min(start + LONGEST_SPAN, tokens)
        seen = keys - tokens + stop
        position = torch.arange(seen - (stop - start), seen, device=device)[:, None]
        mask = torch.arange(seen, device=device) <= position  # [R, N]
        if real is not None:  # a pad sees itself, for a softmax over nothing is undefined
            itself = torch.arange(seen, device=device) == position
            mask = (mask & real[:, None, None, :seen]) | itself
        # Heads that share keys are further rows, so that no key is copied.
        rows = query[:, :, start:stop].unflatten(1, (heads, -1))
        mask = mask.expand(*mask.shape[:-2], stop - start, seen).repeat(*[1] * (mask.ndim - 2), rows.shape[2], 1)
        plain = real is None and stop - start == 1  # which sees everything
        out = scaled_dot_product_attention(
            rows.flatten(2, 3), key[:, :, :seen], value[:, :, :seen], attn_mask=None if plain else mask, scale=scale
        )
        done.append(out.unflatten(2, (-1, stop - start)).flatten(1, 2))
    out = torch.cat(done, 2)
    return out if real is None else out.masked_fill(~real[:, None, -tokens:, None], 0)
