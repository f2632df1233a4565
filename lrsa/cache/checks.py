"""What a cache refuses, before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrsa.attention import SparseAttentionConfig
from lrsa.attention.config import ONCE
from lrsa.attention.huggingface import NAME, check_budget
from lrsa.attention.layout import Geometry
from lrsa.cache.step import Step

_WAY_OUT = "Feed the shorter prompt to a new cache, or copy the cache (copy.deepcopy) before going on"


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
    check_budget(config, text_config)


def check_config(config: SparseAttentionConfig, made_for: SparseAttentionConfig) -> None:
    if config != made_for:
        raise ValueError(
            f"the cache was made for {made_for}, the model attends with {config}: make it with "
            "SparseKVCache(get_attention(model), model.config), or set_attention(model, ...) to the cache's"
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


def check_prompt_length(config: SparseAttentionConfig, prompt_length: int | None) -> None:
    if prompt_length is None:
        return
    if config.schedule != ONCE:
        raise ValueError(
            f"prompt_length={prompt_length} with schedule={config.schedule!r}, which does not ask where a prompt ends: "
            f"leave it out, or set schedule={ONCE!r}"
        )
    if prompt_length < 1:
        raise ValueError(f"prompt_length={prompt_length}: give a positive number of columns, or None")


def check_prompt_block(columns: int, tokens: int, end: int, real: Tensor | None) -> None:
    """Refuse a block of ``tokens`` columns after ``columns`` that a prompt of ``end`` columns cannot take in.

    ``real`` bool ``[B, columns + tokens]``: which columns are tokens; None: all.
    """
    if columns < end < columns + tokens:
        raise ValueError(
            f"columns {columns} to {columns + tokens} are fed at once, but the prompt ends at prompt_length={end}, "
            f"where it is compressed: feed {end - columns} columns, then the others"
        )
    if columns < end and real is not None and bool((real[:, 1:] < real[:, :-1]).any()):
        raise ValueError(
            f"a prompt under schedule={ONCE!r} takes pads on its left alone, so that all rows end together: pad on the "
            "left (tokenizer.padding_side='left'), or feed one row at a time (batch_size=1)"
        )


def check_crop(geometry: Geometry, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Refuse to take rows back from ``before`` to ``after`` tokens where something was compressed between."""
    for row, (now, then) in enumerate(zip(before, after, strict=True)):
        if geometry.held_partitions(then) != geometry.held_partitions(now):
            raise ValueError(
                f"crop takes row {row} from {now} to {then} tokens, into compressed history: at most "
                f"{now - last_compression(geometry, now)} tokens can be taken back here. {_WAY_OUT}"
            )


def check_crop_once(columns: int, end: int) -> None:
    if columns < end:
        raise ValueError(
            f"crop leaves {columns} columns of a prompt of {end}, which schedule={ONCE!r} compresses as a whole: what "
            f"came after it can be taken back, not its own tokens. {_WAY_OUT}"
        )


def last_compression(geometry: Geometry, tokens: int) -> int:
    """Fewest tokens at which as many partitions are compressed as at ``tokens``."""
    held, low, high = geometry.held_partitions(tokens), 0, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if geometry.held_partitions(middle) >= held else (middle + 1, high)
    return low
