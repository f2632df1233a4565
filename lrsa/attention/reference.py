"""The mask form: dense attention under the visibility mask. The specification; O(T^2) memory, any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa.attention.documents import PAD, positions
from lrsa.attention.layout import Geometry

# Logits held at once, 256 MiB of float32, as far as one KV head of a row allows: 4,096 tokens in ten rows of nine heads
# would be gigabytes, several times over.
MOST_LOGITS = 1 << 26


def visible(kept: Tensor, geometry: Geometry, document_ids: Tensor | None) -> Tensor:
    """Who sees what: bool ``[B, H, T, T]`` from ``kept`` bool ``[B, H, T]``.

    Query i sees key j <= i of its document iff j < S, or j >= S + n(c(i)) L, or j is kept.
    """
    position, causal = _causal(kept, document_ids)
    first, chunk, sink, lag = geometry.first_chunk, geometry.chunk, geometry.sink, geometry.lag
    chunk_start = torch.where(position < first, 0, first + (position - first) // chunk * chunk)
    raw_start = sink + ((chunk_start - sink) // lag - 1).clamp(min=0) * lag

    key = position[:, None, :]
    always = (key < sink) | (key >= raw_start[:, :, None])
    return causal[:, None] & (always[:, None] | kept[:, :, None, :])


def visible_once(kept: Tensor, prompt_lengths: Tensor, document_ids: Tensor | None) -> Tensor:
    """The same under schedule ``prefill_once``, with ``prompt_lengths`` int64 ``[B]``.

    Query i sees key j <= i of its document iff i is in the prompt, or j is kept, as all tokens after the prompt are.
    """
    position, causal = _causal(kept, document_ids)
    dense = position < prompt_lengths[:, None]
    return causal[:, None] & (dense[:, None, :, None] | kept[:, :, None, :])


def _causal(kept: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions int64 ``[B, T]``, and bool ``[B, T, T]``: key j <= i of query i's document, pads left out."""
    batch, _, tokens = kept.shape
    if document_ids is None:
        document_ids = torch.zeros((batch, tokens), dtype=torch.int64, device=kept.device)
    position = positions(document_ids)
    causal = position[:, None, :] <= position[:, :, None]
    causal &= document_ids[:, :, None] == document_ids[:, None, :]
    causal &= (document_ids != PAD)[:, None, :]
    return position, causal


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention under ``mask`` in float32 (float64 if the inputs are), autocast off; no visible key gives 0.

    ``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, ``mask [B, H, T, T]`` -> ``[B, Hq, T, D]``.
    """
    heads, tokens = key.shape[1:3]
    # Each KV head becomes a row of its own, and the rows are taken some at a time.
    rows = [x.unflatten(1, (heads, -1)).flatten(0, 1) for x in (query, key, value, mask)]
    step = max(1, MOST_LOGITS // (rows[0].shape[1] * tokens**2))
    parts = [_attend(q, k, v, m, scale) for q, k, v, m in zip(*(x.split(step) for x in rows), strict=True)]
    return torch.cat(parts).unflatten(0, (-1, heads)).flatten(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        q = query.to(dtype).unflatten(1, (key.shape[1], -1))  # [B, H, G, T, D]
        k, v = key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
        nothing = ~mask.any(-1)[:, :, None, :, None]  # pads: softmax over no key is undefined
        unseen = ~mask.any(-2)[:, :, None, :, None]
        # What a pad holds must reach neither output nor gradients even if it is not finite: 0 * inf is NaN.
        q, k, v = q.masked_fill(nothing, 0), k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        logits = (q @ k.mT * scale).masked_fill(~mask[:, :, None], -torch.inf)
        weights = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return (weights @ v).flatten(1, 2).to(query.dtype)
