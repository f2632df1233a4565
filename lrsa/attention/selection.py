"""Scores -> which tokens of the compressed partitions are kept.

B batch, H key/value heads, G query heads a KV head, T tokens, D head dimension; P compressed partitions of L tokens.
Rows here hold one document each, from its first token; `documents` brings padded and packed rows to that form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lrsa.attention import fused, noise
from lrsa.attention.config import SparseAttentionConfig
from lrsa.attention.layout import Geometry
from lrsa.attention.noise import perturbed
from lrsa.attention.prompts import HOW_TO_TELL
from lrsa.attention.scorers import Partitions, Prompt, Scorer

SAFEGUARD = 0.2  # of K, what an adaptive budget leaves every head: AdaKV's own alpha


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
    key, value, query, scale = detached(key, value, query, config, scale)
    return torch.ops.lrsa.select(key, value, query, config.to_json(), partitions, first, origin, layer_idx, scale)


def select_freely(
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    partitions: int,
    *,
    query: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    layer_idx: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The same for what the mask form alone can compute (`SparseAttentionConfig.mask_form_only`): heads may keep
    different numbers of tokens, and rules look at the whole document. bool ``[B, H, P, L]``, True where kept.

    ``prompt_lengths [B]`` int64 for scorers that read the prompt's later queries.

    Raises:
        ValueError: queries or prompt lengths that the scorer needs are missing.
    """
    if config.build_scorer().reads_future and prompt_lengths is None:
        raise ValueError(
            f"scorer {config.scorer!r} ranks by the prompt's later queries and must know where the prompt ends: "
            f"{HOW_TO_TELL}"
        )
    key, value, query, scale = detached(key, value, query, config, scale)
    return torch.ops.lrsa.select_freely(
        key, value, query, prompt_lengths, config.to_json(), partitions, layer_idx, scale
    )


def detached(
    key: Tensor, value: Tensor, query: Tensor | None, config: SparseAttentionConfig, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """What a selection reads, without gradients, and the scale of the logits, 1/sqrt(D) by default.

    Raises:
        ValueError: the scorer reads queries, and there are none.
    """
    if config.build_scorer().reads_query and query is None:
        raise ValueError(f"scorer {config.scorer!r} reads queries: pass query=[B, Hq, T, D]")
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    return key.detach(), value.detach(), None if query is None else query.detach(), scale


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
    geometry, scorer = _parse(config)
    position = geometry.raw_start(first)
    if not noise.active():
        kept = scorer.best(key, value, geometry.lag, partitions, position - origin, geometry.kept, position)
        if kept is not None:
            return kept
    if noise.blind():
        scores = key.new_empty((*key.shape[:2], partitions, geometry.lag), dtype=torch.float32)
    else:
        query = query if scorer.reads_query else None
        with torch.autocast(key.device.type, enabled=False):  # scores are float32 whatever the model computes in
            scores = scoring(key)(scorer, key, value, query, geometry, partitions, first, origin, layer_idx, scale)
    return best_positions(perturbed(scores, scorer), geometry.kept, position)


@functools.lru_cache(maxsize=64)
def _parse(config: str) -> tuple[Geometry, Scorer]:
    parsed = SparseAttentionConfig.from_json(config)
    return parsed.geometry, parsed.build_scorer()


def scoring(key: Tensor) -> Callable[..., Tensor]:
    """The function that scores keys on this device."""
    # Compiled only to train, whose steps are all alike. Without gradients the same function ranks a prompt whole, in
    # blocks and token by token: compiled code rounds otherwise, and a near tie would fall otherwise.
    return _compiled() if key.is_cuda and torch.is_grad_enabled() else _score


def best_positions(scores: Tensor, count: int, position: int) -> Tensor:
    """Positions of the ``count`` highest scores of each partition, ascending: int64 ``[B, H, P * count]``.

    ``scores`` float32 ``[B, H, P, L]``; ``position``: of the first one's token.
    """
    length = scores.shape[-1]
    if fused.runs_on(scores) and scores.dtype == torch.float32 and length <= fused.LONGEST_PARTITION:
        from lrsa.attention import selection_kernel  # needs triton

        return selection_kernel.best_positions(scores, count, position)
    starts = torch.arange(position, position + scores.shape[-2] * length, length, device=scores.device)
    return (best(scores, count) + starts[:, None]).flatten(-2)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of ``[..., L]``, ascending: ``[..., count]`` int64."""
    return _highest(scores, count).sort(dim=-1).values


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
    kept = SparseAttentionConfig.from_json(config).geometry.kept
    return key.new_empty((*key.shape[:2], partitions * kept), dtype=torch.int64)


def _select_freely(
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    prompt_lengths: Tensor | None,
    config: str,
    partitions: int,
    layer_idx: int,
    scale: float,
) -> Tensor:
    parsed = SparseAttentionConfig.from_json(config)
    scorer = parsed.build_scorer()
    parts = partition(key, value, query if scorer.reads_query else None, parsed.geometry, partitions, layer_idx, scale)
    if scorer.reads_future:
        assert query is not None and prompt_lengths is not None
        parts = replace(parts, prompt=Prompt(query.unflatten(1, (key.shape[1], -1)), key, prompt_lengths))
    with torch.autocast(key.device.type, enabled=False):
        scores = scorer(parts)
    return (share_over_heads if parsed.budget == "adaptive" else _mark_highest)(perturbed(scores, scorer), parts.kept)


def _select_freely_shape(
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    prompt_lengths: Tensor | None,
    config: str,
    partitions: int,
    layer_idx: int,
    scale: float,
) -> Tensor:
    lag = SparseAttentionConfig.from_json(config).geometry.lag
    return key.new_empty((*key.shape[:2], partitions, lag), dtype=torch.bool)


def share_over_heads(scores: Tensor, kept: int) -> Tensor:
    """AdaKV's budget, a partition at a time: of ``scores [B, H, P, L]``, the best ``SAFEGUARD * kept`` tokens of each
    head, then the best of all heads until ``H * kept`` are chosen (ties: the earlier position, then the lower head).
    bool ``[B, H, P, L]``.

    Source: AdaKV (arXiv 2407.11550), once for the prompt; here for each partition. The safeguard is a guarantee, as in
    kvpress; the authors' code moves each head's number a fifth of the way back to K.
    """
    heads, length = scores.shape[1], scores.shape[3]
    safe = _mark_highest(scores, int(SAFEGUARD * kept))
    pool = scores.masked_fill(safe, torch.inf).permute(0, 2, 3, 1).flatten(-2)  # [B, P, L * H], heads side by side
    return _mark_highest(pool, heads * kept).unflatten(-1, (length, heads)).permute(0, 3, 1, 2)


def _mark_highest(scores: Tensor, count: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, _highest(scores, count), True)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest along the last dimension, best first.

    A stable sort puts the earlier position first where scores are equal, as the rule asks; topk promises no order.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


# Operators, so that activation checkpointing can keep their result (`checkpoint_contexts`) and compilers leave them be.
_LIBRARY = torch.library.Library("lrsa", "DEF")
_LIBRARY.define(
    "select(Tensor key, Tensor value, Tensor? query, str config, int partitions, int first, int origin, int layer_idx, "
    "float scale) -> Tensor"
)
_LIBRARY.impl("select", _select, "CompositeExplicitAutograd")
torch.library.register_fake("lrsa::select", _select_shape, lib=_LIBRARY)
_LIBRARY.define(
    "select_freely(Tensor key, Tensor value, Tensor? query, Tensor? prompt_lengths, str config, int partitions, "
    "int layer_idx, float scale) -> Tensor"
)
_LIBRARY.impl("select_freely", _select_freely, "CompositeExplicitAutograd")
torch.library.register_fake("lrsa::select_freely", _select_freely_shape, lib=_LIBRARY)


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


def check_kept(kept: Tensor, config: SparseAttentionConfig) -> None:
    """Refuse a ``kept`` bool ``[B, H, T]`` of whole documents that does not fit the config.

    Raises:
        ValueError: a partition whose selection some query uses keeps another number of tokens than K; under an
            adaptive budget, than H K over all heads.
    """
    geometry, heads, where = config.geometry, 1, "a partition"
    counts = _partition_flags(kept, geometry, geometry.selected_partitions(kept.shape[-1])).sum(-1)
    if config.budget == "adaptive":
        counts, heads, where = counts.sum(1), kept.shape[1], f"a partition in {kept.shape[1]} heads together"
    if not bool((counts == heads * geometry.kept).all()):
        raise ValueError(
            f"kept= has between {int(counts.min())} and {int(counts.max())} tokens {where}, the config keeps "
            f"{heads * geometry.kept} of {heads * geometry.lag}: pass what kept_tokens returned for this config"
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
        operators = (
            torch.ops.lrsa.select,
            torch.ops.lrsa.select_freely,
            torch.ops.lrsa.select_once,
            torch.ops.lrsa.select_in_layer,
        )
        saved = op in [operator.default for operator in operators]
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
