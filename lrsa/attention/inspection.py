"""Looking into a forward pass: what each layer's selection reads, how it ranks the tokens; and choosing in its place.

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
from lrsa.attention.api import kept_tokens
from lrsa.attention.config import ONCE, SparseAttentionConfig
from lrsa.attention.prompts import lengths_of_rows
from lrsa.attention.scorers import Partitions, Prompt
from lrsa.attention.selection import detached, partition


class LayerInputs(NamedTuple):
    """What one layer attends with: ``query [B, Hq, T, D]``, ``key``/``value [B, H, T, D]`` after RoPE; the last two as
    `sparse_attention` takes them.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    config: SparseAttentionConfig
    scale: float | None
    document_ids: Tensor | None = None
    prompt_lengths: Tensor | int | None = None


Choice = Callable[[LayerInputs], Tensor | None]

_OBSERVERS: list[Callable[[LayerInputs], None]] = []  # empty but inside `inspecting`
_CHOICES: list[Choice] = []  # empty but inside `selecting`


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


@contextlib.contextmanager
def selecting(choice: Choice) -> Iterator[None]:
    """Inside, every ``lrsa`` attention layer keeps what `choice` says, without a cache: bool ``[B, H, T]`` as
    `kept_tokens` returns it and with as many tokens as the layer's config keeps (ValueError otherwise), or None, for
    what it would have kept anyway. Of several inside one another the innermost is asked.
    """
    _CHOICES.append(choice)
    try:
        yield
    finally:
        _CHOICES.remove(choice)


def active() -> bool:
    """Whether anybody is looking, or choosing."""
    return bool(_OBSERVERS or _CHOICES)


def show(inputs: LayerInputs) -> Tensor | None:
    """Called by the bridge: hand a layer's inputs to who is `inspecting`, and return what who is `selecting` chose."""
    for observer in _OBSERVERS:
        observer(inputs)
    return _CHOICES[-1](inputs) if _CHOICES else None


def kept_by(inputs: LayerInputs, config: SparseAttentionConfig | None = None) -> Tensor:
    """`kept_tokens` of a layer, bool ``[B, H, T]``; under another `config` than its own, on the same inputs."""
    config = inputs.config if config is None else config
    return kept_tokens(
        inputs.key, inputs.value, config, query=inputs.query, layer_idx=inputs.layer_idx,
        document_ids=inputs.document_ids, prompt_lengths=inputs.prompt_lengths if config.reads_prompt_lengths else None,
        scale=inputs.scale,
    )  # fmt: skip


def token_scores(inputs: LayerInputs) -> Tensor:
    """The scores that rank a layer's tokens, ``[B, H, T]`` float32; NaN for what is never ranked: sinks, the raw tail,
    and all of a dense layer. They compare within a partition and a head alone.

    Rows are one prompt each, without pads.
    """
    layer_idx, key, config = inputs.layer_idx, inputs.key, inputs.config
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
    layer_idx, query, key, value = inputs[:4]
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
