"""Ways to feed a cache, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def feed(model, cache, input_ids: Tensor, blocks: int | Iterable[int], attention_mask: Tensor | None = None) -> Tensor:
    """Logits ``[B, T, V]`` of ``input_ids`` fed in blocks of a size, or of these sizes; the mask covers the past."""
    total = input_ids.shape[1]
    sizes = [blocks] * -(-total // blocks) if isinstance(blocks, int) else list(blocks)
    past, start, logits = cache.get_seq_length(), 0, []
    lengths = cache.lengths or (0,) * len(input_ids)
    for size in sizes:
        ids = input_ids[:, start : start + size]
        if attention_mask is None:
            mask, positions = None, torch.tensor(lengths)[:, None] + start + torch.arange(ids.shape[1])
            positions = positions.to(ids.device)
        else:
            mask = attention_mask[:, : past + start + ids.shape[1]]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
def parallel(model, input_ids: Tensor) -> Tensor:
    """Logits of one pass without a cache: the parallel form."""
    return model(input_ids=input_ids, use_cache=False).logits


def kept(cache) -> list[list[list[list[int]]]]:
    """Positions held, of each lrsa layer, row and head."""
    layers = [i for i, layer in enumerate(cache.report().layers) if layer.kind != "sliding"]
    return [[row.tolist() for row in cache.kept(index)] for index in layers]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``[B, T]`` ids and mask of rows of different lengths, pads on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask
