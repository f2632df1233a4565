"""A gradient for the selection: the straight-through estimator (Bengio, Léonard & Courville, arXiv 1308.3432).

Kept values are multiplied by a gate that is exactly 1, and whose gradient goes on to the scores of the tokens that were
kept: what made a kept token useful raises its score. Tokens that were dropped are not compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa.attention.config import SparseAttentionConfig
from lrsa.attention.noise import logits
from lrsa.attention.selection import scoring

DIFFERENTIABLE = ("lag_relative", "snapkv", "h2o", "tova", "expected_attention", "keydiff")  # others rank, or round


def gate(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    config: SparseAttentionConfig,
    partitions: int,
    *,
    query: Tensor,
    layer_idx: int,
    scale: float,
) -> Tensor:
    """Ones ``[B, H, P * K]`` float32 for the positions ``index`` that are kept of ``partitions`` partitions.

    Their gradient is that of the scores' logarithms (standardised scores where they are no amounts, as for noise): a
    LagKV score, a share of two in 128 tokens, would otherwise get next to none.

    Args: as `selection.select`, with gradients.

    Raises:
        ValueError: a scorer whose scores carry no gradient, such as ranks and rounded norms.
    """
    geometry, scorer = config.geometry, config.build_scorer()
    read = query if scorer.reads_query else None
    with torch.autocast(key.device.type, enabled=False):
        scores = scoring(key)(scorer, key, value, read, geometry, partitions, 0, 0, layer_idx, scale)
    if torch.is_grad_enabled() and key.requires_grad and not scores.requires_grad:
        raise ValueError(
            f"straight_through passes a gradient on to the scores, and those of scorer={config.scorer!r} carry none: "
            f"choose one of {', '.join(DIFFERENTIABLE)}, or straight_through=False"
        )
    kept = logits(scores, scorer).flatten(-2).gather(-1, index - geometry.sink)
    return 1 + (kept - kept.detach())
