"""Scores -> which tokens of the compressed partitions are kept.

B batch, H key/value heads, G query heads a KV head, T tokens, D head dimension; P compressed partitions of L tokens.
Rows here hold one document each, from its first token; `documents` brings padded and packed rows to that form.
"""

from __future__ import annotations

import functools
import json

import torch
from torch import Tensor

from lrsa.attention.config import SparseAttentionConfig
from lrsa.attention.layout import Geometry
from lrsa.attention.scorers import Partitions, Scorer


def select(
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    partitions: int,
    *,
    query: Tensor | None = None,
    layer_idx: int = 0,
    scale: float | None = None,
    first: int = 0,
    origin: int = 0,
) -> Tensor:
    """Positions kept of ``partitions`` partitions, ``[B, H, P * K]`` int64, ascending. Carries no gradient.

    ``key``, ``value`` ``[B, H, T, D]``; ``query`` ``[B, Hq, T, D]`` for scorers that read queries. T must reach the
    end of the last partition's lag. ``first``: the first of the partitions; ``origin``: the position of the tensors'
    first token. A cache, which no longer has the tokens before, sets both.
    """
    geometry = config.geometry
    if partitions == 0 or geometry.kept == 0:
        return torch.empty((*key.shape[:2], 0), dtype=torch.int64, device=key.device)
    if config.build_scorer().reads_query and query is None:
        raise ValueError(f"scorer {config.scorer!r} reads queries: pass query=[B, Hq, T, D]")
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    query = None if query is None else query.detach()
    where = partitions, first, origin
    return torch.ops.lrsa.select(key.detach(), value.detach(), query, config.to_json(), *where, layer_idx, scale)


def _select(
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    config: str,
    partitions: int,
    first: int,
    origin: int,
    layer_idx: int,
    scale: float,
) -> Tensor:
    parsed = _parse(config)
    geometry, scorer = parsed.geometry, parsed.build_scorer()
    query = query if scorer.reads_query else None
    # Only to train, whose steps are all alike. Without gradients the same function ranks a prompt whole, in blocks
    # and token by token: compiled code rounds otherwise, and a near tie would fall otherwise.
    score = _compiled() if key.is_cuda and torch.is_grad_enabled() else _score
    with torch.autocast(key.device.type, enabled=False):  # scores are float32 whatever the model computes in
        scores = score(scorer, key, value, query, geometry, partitions, first, origin, layer_idx, scale)
    kept = best(scores, geometry.kept)
    starts = torch.arange(first, first + partitions, device=key.device) * geometry.lag + geometry.sink
    return (kept + starts[:, None]).flatten(-2)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of ``[..., L]``, ascending: ``[..., count]`` int64."""
    # A stable sort puts the earlier position first where scores are equal, as the rule asks; topk promises no order.
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return ranked.sort(dim=-1).values


def _select_shape(
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    config: str,
    partitions: int,
    first: int,
    origin: int,
    layer_idx: int,
    scale: float,
) -> Tensor:
    kept = _parse(config).geometry.kept
    return key.new_empty((*key.shape[:2], partitions * kept), dtype=torch.int64)


# One operator, so that activation checkpointing can keep its result (`checkpoint_contexts`) and compilers leave it be.
_LIBRARY = torch.library.Library("lrsa", "DEF")
_LIBRARY.define(
    "select(Tensor key, Tensor value, Tensor? query, str config, int partitions, int first, int origin, int layer_idx, "
    "float scale) -> Tensor"
)
_LIBRARY.impl("select", _select, "CompositeExplicitAutograd")
torch.library.register_fake("lrsa::select", _select_shape, lib=_LIBRARY)


def _score(
    scorer: Scorer,
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    geometry: Geometry,
    partitions: int,
    first: int,
    origin: int,
    layer_idx: int,
    scale: float,
) -> Tensor:
    return scorer(partition(key, value, query, geometry, partitions, layer_idx, scale, first, origin))


@functools.cache
def _compiled():
    """On a GPU a dozen small operators cost more to launch than to run. The sort stays out: compiling one takes longer
    than a short training."""
    return torch.compile(_score)


@functools.lru_cache(maxsize=256)
def _parse(config: str) -> SparseAttentionConfig:
    return SparseAttentionConfig.from_dict(json.loads(config))


def partition(
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    geometry: Geometry,
    partitions: int,
    layer_idx: int,
    scale: float,
    first: int = 0,
    origin: int = 0,
) -> Partitions:
    """Cut ``[B, H, T, D]`` keys and values into partitions and their lags; views, nothing is copied."""
    lag, begin = geometry.lag, geometry.sink + first * geometry.lag

    def cut(x: Tensor, ahead: int) -> Tensor:
        start = begin - origin + ahead * lag
        return x[..., start : start + partitions * lag, :].unflatten(-2, (partitions, lag))

    grouped = None if query is None else query.unflatten(1, (key.shape[1], -1))
    positions = torch.arange(partitions * lag, device=key.device).view(partitions, lag) + begin
    return Partitions(
        key=cut(key, 0),
        value=cut(value, 0),
        lag_key=cut(key, 1),
        lag_value=cut(value, 1),
        lag_query=None if grouped is None else cut(grouped, 1),
        positions=positions,
        layer_idx=layer_idx,
        scale=scale,
        kept=geometry.kept,
    )


def kept_mask(index: Tensor, tokens: int, geometry: Geometry, partitions: int) -> Tensor:
    """Positions ``[B, H, P * K]`` -> bool ``[B, H, T]``: True for sinks, kept tokens, and what is not compressed."""
    mask = torch.ones((*index.shape[:2], tokens), dtype=torch.bool, device=index.device)
    mask[..., geometry.sink : geometry.raw_start(partitions)] = False
    return mask.scatter_(-1, index, True)


def kept_index(kept: Tensor, geometry: Geometry, partitions: int) -> Tensor:
    """Inverse of `kept_mask` for the first ``partitions`` partitions, K positions of each (see `check_kept`)."""
    flags = _partition_flags(kept, geometry, partitions)
    ranked = flags.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., : geometry.kept]
    starts = torch.arange(partitions, device=kept.device) * geometry.lag + geometry.sink
    return (ranked + starts[:, None]).flatten(-2)


def check_kept(kept: Tensor, geometry: Geometry) -> None:
    """Refuse a ``kept`` bool ``[B, H, T]`` of whole documents that does not fit the geometry.

    Raises:
        ValueError: a partition whose selection some query uses keeps another number of tokens than K.
    """
    counts = _partition_flags(kept, geometry, geometry.selected_partitions(kept.shape[-1])).sum(-1)
    if not bool((counts == geometry.kept).all()):
        raise ValueError(
            f"kept= has between {int(counts.min())} and {int(counts.max())} tokens a partition, the config keeps "
            f"{geometry.kept} of {geometry.lag}: pass what kept_tokens returned for this config"
        )


def _partition_flags(kept: Tensor, geometry: Geometry, partitions: int) -> Tensor:
    """``[B, H, P, L]`` of the first ``partitions`` partitions."""
    return kept[..., geometry.sink : geometry.raw_start(partitions)].unflatten(-1, (partitions, geometry.lag))


def checkpoint_contexts():
    """``context_fn`` for `torch.utils.checkpoint`: recompute everything but the selection, which is kept.

    The kept positions are a few integers; recomputing them could in principle break a tie differently than the forward.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        saved = op in (torch.ops.lrsa.select.default, torch.ops.lrsa.select_once.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
