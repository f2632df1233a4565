"""What a cache refuses, before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.huggingface import NAME
from lrsa.attention.layout import Geometry
from lrsa.cache.step import Step


def check_model(config: SparseAttentionConfig, text_config: Any) -> None:
    if config.mask_form_only:
        raise ValueError(
            f"SparseKVCache cannot hold this: {config.mask_form_only}. Score it in one pass without a cache "
            "(lrsa-eval mode=score, use_cache=False), or set_attention to a config that a cache can follow"
        )
    implementation = getattr(text_config, "_attn_implementation", None)
    if implementation != NAME:
        raise ValueError(
            f"SparseKVCache needs a model that attends through lrsa, this has attn_implementation={implementation!r}: "
            "any other would attend to the newest block alone. Load it with lrsa.models.load_model(name, "
            "attention=SparseAttentionConfig(...)) or call set_attention(model, ...)"
        )
    stored = getattr(text_config, NAME, None)
    if stored is None or SparseAttentionConfig.from_dict(stored) != config:
        raise ValueError(
            f"the model's attention is {stored}, the cache is asked for {config.to_dict()}: give both the same, with "
            "set_attention(model, config)"
        )


def check_positions(step: Step, position_ids: Tensor) -> None:
    """Keys are rotated by their position: a wrong one is a wrong key, and another selection."""
    expected = torch.tensor(step.before)[:, None] + torch.arange(step.tokens)
    real = step.real
    if real is not None:
        expected = torch.tensor(step.before)[:, None] + real.cumsum(-1) - 1
    given = position_ids.cpu().expand_as(expected)
    wrong = given != expected if real is None else (given != expected) & real
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: new token {column} has position {int(given[row, column])} and should have "
            f"{int(expected[row, column])}, the number of tokens before it, pads not counted. Pass position_ids, e.g. "
            "(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -T:], as generate does. (transformers 5.2 counts wrongly "
            "with prefill_chunk_size: use lrsa.cache.prefill(..., block_size=) instead)"
        )


def last_compression(geometry: Geometry, tokens: int) -> int:
    """Fewest tokens at which as many partitions are compressed as at ``tokens``."""
    held, low, high = geometry.held_partitions(tokens), 0, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if geometry.held_partitions(middle) >= held else (middle + 1, high)
    return low
