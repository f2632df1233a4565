"""Compression once, at the end of the prompt: schedule ``prefill_once``, as SnapKV, H2O and kvpress are published.

Of a prompt of n tokens a head keeps S sinks, the last W tokens and the best K of the p between them (`PromptGeometry`).
Queries of the prompt attend densely, so the token that the prompt itself predicts is that of full attention; all later
ones see what is kept and everything from n on. Unlike the chunked rule this depends on where the prompt ends.

B batch, Hq query heads, H key/value heads, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrsa.attention.config import ONCE, SparseAttentionConfig
from lrsa.attention.dense import attend_dense, attend_last
from lrsa.attention.documents import Document, LastResult, find_documents
from lrsa.attention.layout import PromptGeometry
from lrsa.attention.noise import perturbed
from lrsa.attention.prompts import HOW_TO_TELL, lengths_of_rows
from lrsa.attention.scorers import Partitions
from lrsa.attention.selection import best, detached


class Row(NamedTuple):
    """Where a batch row's document stands, ``[start, start + length)``, and the tokens of its prompt."""

    start: int
    length: int
    prompt: int


Rows = dict[Row, list[int]]  # batch rows that are alike


def find_rows(prompt_lengths: Tensor | int | None, document_ids: Tensor | None, batch: int, tokens: int) -> Rows:
    """The rows of a batch ``[B, T]``, those that are alike together.

    Args:
        prompt_lengths, document_ids: as `sparse_attention` takes them. A row of pads alone is left out.

    Raises:
        ValueError: no lengths, lengths outside the rows, or a row that holds several documents.
    """
    if prompt_lengths is None:
        raise ValueError(f"schedule={ONCE!r} compresses at the end of the prompt: {HOW_TO_TELL}")
    lengths = _integers(lengths_of_rows(prompt_lengths, batch, document_ids))
    documents = [Document(row, 0, tokens) for row in range(batch)]
    if document_ids is not None:
        documents = find_documents(document_ids)
    found: Rows = {}
    for row, start, length in ((d.row, d.start, d.length) for d in documents):
        prompt = lengths[row]
        if not 1 <= prompt <= length:
            raise ValueError(f"prompt_lengths: row {row} has a prompt of {prompt} tokens and {length} tokens in all")
        found.setdefault(Row(start, length, prompt), []).append(row)
    return found


_LAST: LastResult[list[int]] = LastResult()  # looking into a tensor on the GPU waits for it: once a forward pass


def _integers(lengths: Tensor) -> list[int]:
    for known in _LAST.get(lengths):
        return known
    return _LAST.put(lengths.tolist(), lengths)


def kept_tokens(
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig | None,
    rows: Rows,
    *,
    query: Tensor | None,
    layer_idx: int,
    scale: float | None,
) -> Tensor:
    """bool ``[B, H, T]``: True for what is held of the prompt and for all that follows it; False for pads.

    ``config`` None: a dense layer, which holds everything.
    """
    kept = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device)
    for row, members in rows.items():
        begin, end = row.start, row.start + row.prompt
        if config is None:
            kept[members, :, begin : begin + row.length] = True
            continue
        k, v = key[members, :, begin:end], value[members, :, begin:end]
        q = None if query is None else query[members, :, begin:end]
        held = torch.zeros((*k.shape[:2], row.length), dtype=torch.bool, device=key.device)
        held[..., row.prompt :] = True
        held.scatter_(-1, held_positions(k, v, config, query=q, layer_idx=layer_idx, scale=scale), True)
        kept[members, :, begin : begin + row.length] = held
    return kept


def prompts(rows: Rows, kept: Tensor) -> Tensor:
    """Tokens of the prompt of each row of ``kept [B, H, T]``, int64 ``[B]``; 0 where it holds pads alone."""
    lengths = torch.zeros(len(kept), dtype=torch.int64)
    for row, members in rows.items():
        lengths[members] = row.prompt
    return lengths.to(kept.device)


def check_kept(kept: Tensor, config: SparseAttentionConfig, rows: Rows) -> None:
    """Refuse a ``kept`` bool ``[B, H, T]`` that ``config`` could not have given.

    Raises:
        ValueError: another number of ranked tokens than K, or one missing that is always kept.
    """
    for row, members in rows.items():
        prompt, own = config.prompt(row.prompt), kept[members, :, row.start : row.start + row.length]
        counts = own[..., prompt.sink : prompt.lag_start].sum(-1)
        always = own[..., : prompt.sink].all() and own[..., prompt.lag_start :].all()
        if not (always and bool((counts == prompt.kept).all())):
            raise ValueError(
                f"kept= has between {int(counts.min())} and {int(counts.max())} of the {prompt.ranked} ranked tokens "
                f"of row {members[0]}, the config keeps {prompt.kept}, and all others: pass what kept_tokens returned"
            )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    config: SparseAttentionConfig | None,
    rows: Rows,
    scale: float,
) -> Tensor:
    """The parallel form, memory linear in the prompt: the prompt densely, then what follows over ``[kept | rest]``.

    ``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, ``kept`` bool ``[B, H, T]``, as many as ``config``
    keeps (None: all) -> ``[B, Hq, T, D]``, zeros at pads.
    """
    out = torch.zeros_like(query)
    for row, members in rows.items():
        own = slice(row.start, row.start + row.length)
        q, k, v, flags = (x[members, :, own] for x in (query, key, value, kept))
        held = row.prompt if config is None else config.prompt(row.prompt).held
        out[members, :, own] = _attend(q, k, v, flags, row.prompt, held, scale)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, prompt: int, held: int, scale: float) -> Tensor:
    """Rows of one document each, all with a prompt of ``prompt`` tokens, of which ``held`` are kept."""
    if held == prompt:
        return attend_dense(query, key, value, scale)
    out = attend_dense(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], scale)
    if query.shape[2] == prompt:
        return out
    index = best(kept[..., :prompt].to(torch.int8), held)
    k, v = (torch.cat([pick(x, index), x[:, :, prompt:]], 2) for x in (key, value))
    return torch.cat([out, attend_last(query[:, :, prompt:], k, v, scale)], 2)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, H, T, D]`` at ``index [B, H, M]``: ``[B, H, M, D]``."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


# ------------------------------------------------------------------ the selection


def held_positions(
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    *,
    query: Tensor | None,
    layer_idx: int,
    scale: float | None,
) -> Tensor:
    """Positions that each head holds of a prompt, ``[B, H, S + K + W]`` int64, ascending. Carries no gradient.

    ``key``/``value`` ``[B, H, n, D]``, the prompt alone; ``query`` ``[B, Hq, W or more, D]``, its last ones, for rules
    that read queries.
    """
    prompt = config.prompt(key.shape[2])
    always = torch.arange(prompt.length, device=key.device).expand(*key.shape[:2], -1)
    if prompt.kept == prompt.ranked:
        return always
    first, last = always[..., : prompt.sink], always[..., prompt.lag_start :]
    if prompt.kept == 0:
        return torch.cat([first, last], -1)
    lag_query = None if query is None else query[:, :, prompt.lag_start - prompt.length :]
    key, value, lag_query, scale = detached(key, value, lag_query, config, scale)
    chosen = torch.ops.lrsa.select_once(key, value, lag_query, config.to_json(), layer_idx, scale)
    return torch.cat([first, chosen, last], -1)


def _select(key: Tensor, value: Tensor, query: Tensor | None, config: str, layer_idx: int, scale: float) -> Tensor:
    parsed = SparseAttentionConfig.from_json(config)
    prompt, scorer = parsed.prompt(key.shape[2]), parsed.build_scorer()
    query = query if scorer.reads_query else None
    with torch.autocast(key.device.type, enabled=False):  # scores are float32 whatever the model computes in
        scores = scorer(whole_prompt(key, value, query, prompt, layer_idx, scale))[:, :, 0]
    return best(perturbed(scores, scorer), prompt.kept) + prompt.sink


def _select_shape(
    key: Tensor, value: Tensor, query: Tensor | None, config: str, layer_idx: int, scale: float
) -> Tensor:
    kept = SparseAttentionConfig.from_json(config).prompt(key.shape[2]).kept
    return key.new_empty((*key.shape[:2], kept), dtype=torch.int64)


def whole_prompt(
    key: Tensor, value: Tensor, query: Tensor | None, prompt: PromptGeometry, layer_idx: int, scale: float
) -> Partitions:
    """The prompt as one partition and its lag; views, nothing is copied."""
    ranked, lag = slice(prompt.sink, prompt.lag_start), slice(prompt.lag_start, prompt.length)
    return Partitions(
        key=key[:, :, None, ranked],
        value=value[:, :, None, ranked],
        lag_key=key[:, :, None, lag],
        lag_value=value[:, :, None, lag],
        lag_query=None if query is None else query.unflatten(1, (key.shape[1], -1))[:, :, :, None],
        positions=torch.arange(prompt.sink, prompt.lag_start, device=key.device)[None],
        layer_idx=layer_idx,
        scale=scale,
        kept=prompt.kept,
    )


# One operator, for the reasons that `selection` gives.
_LIBRARY = torch.library.Library("lrsa", "FRAGMENT")
_LIBRARY.define(
    "select_once(Tensor key, Tensor value, Tensor? query, str config, int layer_idx, float scale) -> Tensor"
)
_LIBRARY.impl("select_once", _select, "CompositeExplicitAutograd")
torch.library.register_fake("lrsa::select_once", _select_shape, lib=_LIBRARY)
