"""Looking into a forward pass: what each layer's selection reads, and how it ranks the tokens.

B batch, Hq query heads, H key/value heads, T tokens, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa.attention import once
from lrsa.attention.config import ONCE, SparseAttentionConfig
from lrsa.attention.prompts import lengths_of_rows
from lrsa.attention.scorers import Partitions, Prompt
from lrsa.attention.selection import detached, partition


class LayerInputs(NamedTuple):
    """What one layer attends with: ``query [B, Hq, T, D]``, ``key``/``value [B, H, T, D]`` after RoPE."""

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    config: SparseAttentionConfig
    scale: float | None


_OBSERVERS: list[Callable[[LayerInputs], None]] = []  # empty but inside `inspecting`


@contextlib.contextmanager
def inspecting(observer: Callable[[LayerInputs], None]) -> Iterator[None]:
    """Inside, `observer` is called by every ``lrsa`` attention layer before it attends, without a cache. The tensors
    are the layer's own: take what you need of them, and let them go.
    """
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def show(
    layer_idx: int, query: Tensor, key: Tensor, value: Tensor, config: SparseAttentionConfig, scale: float | None
) -> None:
    """Called by the bridge: hand a layer's inputs to who is `inspecting`."""
    for observer in _OBSERVERS:
        observer(LayerInputs(layer_idx, query, key, value, config, scale))


def token_scores(inputs: LayerInputs) -> Tensor:
    """The scores that rank a layer's tokens, ``[B, H, T]`` float32; NaN for what is never ranked: sinks, the raw tail,
    and all of a dense layer. They compare within a partition and a head alone.

    Rows are one prompt each, without pads.
    """
    layer_idx, _, key, _, config, _ = inputs
    scores = torch.full(key.shape[:3], torch.nan, device=key.device)
    layer, tokens = config.for_layer(layer_idx), key.shape[2]
    if layer is None:
        return scores
    first = layer.sink_size
    if layer.schedule == ONCE:
        last = layer.prompt(tokens).lag_start
    else:
        last = layer.geometry.raw_start(layer.geometry.compressed(tokens))
    if first < last:
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            scores[..., first:last] = layer.build_scorer()(_parts(inputs, layer)).flatten(-2)
    return scores


def _parts(inputs: LayerInputs, layer: SparseAttentionConfig) -> Partitions:
    """What the layer's scorer reads."""
    layer_idx, query, key, value, _, _ = inputs
    scorer, tokens = layer.build_scorer(), key.shape[2]
    key, value, read, scale = detached(key, value, query if scorer.reads_query else None, layer, inputs.scale)
    if layer.schedule == ONCE:
        prompt = layer.prompt(tokens)
        return once.whole_prompt(
            key, value, None if read is None else read[:, :, prompt.lag_start :], prompt, layer_idx, scale
        )
    partitions = layer.geometry.compressed(tokens)
    parts = partition(key, value, read, layer.geometry, partitions, layer_idx, scale)
    if scorer.reads_future and read is not None:
        whole = Prompt(read.unflatten(1, (key.shape[1], -1)), key, lengths_of_rows(tokens, len(key), None, key.device))
        parts = replace(parts, prompt=whole)
    return parts
