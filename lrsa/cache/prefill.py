"""Filling a cache with a prompt: in one pass, or in blocks where memory is short."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrsa.cache.cache import SparseKVCache


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor,
    cache: Any,
    attention_mask: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Feed ``input_ids [B, T]`` to ``cache``, which may hold something; logits ``[B, V]`` after the last column.

    Args:
        cache: a `SparseKVCache`, or any cache of transformers. One that compresses once and is empty takes all of
            ``input_ids`` for its prompt, unless it was made with another ``prompt_length``.
        attention_mask: ``[B, columns]``, 0 at pads, columns of the past included; None: no pads.
        block_size: columns a forward pass; None: all at once. The same comes out, with the memory of a block's
            activations instead of the whole prompt's.

    Raises:
        ValueError: no tokens, or a block size below 1.
    """
    batch, new = input_ids.shape
    if new == 0:
        raise ValueError("input_ids holds no token: nothing to feed")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size}: give a number of tokens of at least 1, or None for one pass")
    past = int(cache.get_seq_length())
    if isinstance(cache, SparseKVCache):
        cache.expect_prompt(new)
    if attention_mask is None:
        positions = torch.arange(past, past + new, device=input_ids.device).expand(batch, -1)
        lengths = getattr(cache, "lengths", ())
        if lengths:  # pads of earlier turns do not count
            positions = positions - past + torch.tensor(lengths, device=input_ids.device)[:, None]
            attention_mask = cache.padding_mask(new)
    else:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
    logits = None
    for start in range(0, new, block_size or new):
        block = slice(start, start + (block_size or new))
        columns = past + min(block.stop, new)
        logits = model(
            input_ids=input_ids[:, block],
            attention_mask=None if attention_mask is None else attention_mask[:, :columns],
            position_ids=positions[:, block],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    assert logits is not None
    return logits
