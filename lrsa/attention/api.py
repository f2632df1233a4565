"""Sparse attention on tensors: validates, dispatches to a backend.

B batch, Hq query heads, H key/value heads (Hq a multiple of H), T tokens, D head dimension.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lrsa.attention import flash4, flex, gather, once, reference
from lrsa.attention.config import ONCE, SparseAttentionConfig
from lrsa.attention.dense import attend_dense
from lrsa.attention.documents import find_documents, per_document
from lrsa.attention.layout import Geometry
from lrsa.attention.prompts import lengths_of_rows, refuse_unread
from lrsa.attention.selection import check_kept, kept_index, kept_mask, select, select_freely
from lrsa.attention.straight_through import gate as selection_gate

log = logging.getLogger(__name__)
BACKENDS = ("auto", "reference", "gather", "flex", "flash4")
# Pairs of a batch's rows times channels, B Hq T T D: 4,096 tokens of 32 heads of 128, where our kernels on Hopper take
# less than dense attention's by far. At half of it, 8,192 tokens of SmolLM2's shape, the step waits for their launches
# (experiments/benchmark), and FlexAttention's is shorter.
FLASH4_FROM = 6e10
LIBRARYS_FROM = 2e11  # where flash4 is the library's kernels as they come, through whose interface a call takes longer
SHORT_PROMPT = 2048  # tokens; below, compiling FlexAttention takes longer than many passes through gather


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    *,
    kept: Tensor | None = None,
    layer_idx: int = 0,
    document_ids: Tensor | None = None,
    prompt_lengths: Tensor | int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    straight_through: bool = False,
) -> Tensor:
    """Causal attention in which old partitions show only their kept tokens (LRSA, arXiv 2506.11498).

    Args:
        query: ``[B, Hq, T, D]``, after RoPE, any floating dtype.
        key, value: ``[B, H, T, D]``, the keys after RoPE.
        config: the function; the backends compute the same one to rounding.
        kept: bool ``[B, H, T]`` as `kept_tokens` returns it, to skip the selection.
        layer_idx: read by scorers that depend on the layer, and matched against ``config.dense_layers``.
        document_ids: int ``[B, T]``, -1 for a pad; None: each row is one document. Padding and packing alike.
        prompt_lengths: int64 ``[B]`` or an int, tokens of each row's prompt, pads not counted; a row then holds one
            document. For a config that ``reads_prompt_lengths`` alone: schedule ``prefill_once``, which needs them, and
            scorers that look ahead in the prompt.
        scale: of the logits; 1/sqrt(D) by default.
        backend: ``reference`` (mask form, O(T^2) memory), ``gather`` (chunked SDPA, any device), ``flex``
            (FlexAttention, CUDA), ``flash4`` (flash-attn-4 on Hopper and Blackwell, bfloat16 and float16), or ``auto``,
            which is the fastest one measured, and ``reference`` for what no other can compute
            (`SparseAttentionConfig.mask_form_only`). ``prefill_once`` has one parallel form, on PyTorch's own kernels,
            which runs for all but ``reference``.
        straight_through: give the scores of kept tokens a gradient, the output being the same bit for bit (see
            `lrsa.attention.straight_through`); ``gather``, ``flex`` and ``flash4``, schedule ``chunked``.

    Returns:
        ``[B, Hq, T, D]`` in ``query``'s dtype (under autocast in autocast's, as PyTorch's own attention, ``reference``
        excepted); zeros at pads.

    Raises:
        ValueError: shapes or dtypes that do not fit, a ``kept`` with other than K tokens in a compressed partition,
            an unknown backend, or one that cannot run here and why; ``prompt_lengths`` missing or not asked for.
    """
    _check(query, key, value, kept, document_ids)
    refuse_unread(prompt_lengths, config)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if straight_through and (kept is not None or config.schedule == ONCE):
        given = f"schedule={ONCE!r}" if kept is None else "kept="
        raise ValueError(f"straight_through=True with {given}: it takes a selection of the chunked schedule's own")
    if config.schedule == ONCE:
        rows = once.find_rows(prompt_lengths, document_ids, key.shape[0], key.shape[2])
        return _attend_once(query, key, value, config, rows, kept, layer_idx, document_ids, scale, backend)
    layer = config.for_layer(layer_idx)
    backend = choose_backend(backend, query, document_ids, layer, key.shape[1])
    if kept is not None and layer is not None:
        _check_counts(kept, config, document_ids)
    if backend == "reference":
        if straight_through and layer is not None:
            raise ValueError("backend='reference' has no straight_through: use 'gather', 'flex', 'flash4' or 'auto'")
        if kept is None:
            kept = kept_tokens(
                key, value, config, query=query, layer_idx=layer_idx, document_ids=document_ids,
                prompt_lengths=prompt_lengths, scale=scale,
            )  # fmt: skip
        if layer is None:
            kept = torch.ones_like(kept)
        mask = reference.visible(kept, config.geometry, document_ids)
        return reference.attend(query, key, value, mask, scale)

    def attend(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None) -> Tensor:
        tokens = query.shape[2]
        partitions = 0 if layer is None else config.geometry.selected_partitions(tokens)
        if partitions == 0:
            return attend_dense(query, key, value, scale)
        if kept is None:
            index = select(key, value, config, partitions, query=query, layer_idx=layer_idx, scale=scale)
        else:
            index = kept_index(kept, config.geometry, partitions)
        gate = None
        if straight_through:
            gate = selection_gate(key, value, index, config, partitions, query=query, layer_idx=layer_idx, scale=scale)
        # After the selection, so that every backend ranks the same keys.
        query, key, value = (_autocast(x) for x in (query, key, value))
        return attend_selected(query, key, value, index, config.geometry, scale, backend, gate)

    if document_ids is None:
        return attend(query, key, value, kept)
    return per_document(attend, document_ids, query, key, value, kept)


def _attend_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    rows: once.Rows,
    kept: Tensor | None,
    layer_idx: int,
    document_ids: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    _check_backend(backend)
    layer = config.for_layer(layer_idx)
    if layer is None:
        kept = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    elif kept is None:
        kept = once.kept_tokens(key, value, layer, rows, query=query, layer_idx=layer_idx, scale=scale)
    else:
        once.check_kept(kept, layer, rows)
    if backend == "reference":
        mask = reference.visible_once(kept, once.prompts(rows, kept), document_ids)
        return reference.attend(query, key, value, mask, scale)
    # After the selection, so that every backend ranks the same keys.
    query, key, value = (_autocast(x) for x in (query, key, value))
    return once.attend(query, key, value, kept, layer, rows, scale)


def kept_tokens(
    key: Tensor,
    value: Tensor,
    config: SparseAttentionConfig,
    *,
    query: Tensor | None = None,
    layer_idx: int = 0,
    document_ids: Tensor | None = None,
    prompt_lengths: Tensor | int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Which tokens each head still holds once all T were read.

    Args: as `sparse_attention`; ``query`` is needed by scorers that read queries.

    Returns:
        bool ``[B, H, T]``: True for sinks, kept tokens, and what is not compressed (yet); False for pads.

    Raises:
        ValueError: the scorer needs queries or prompt lengths that are missing or do not fit.
    """
    refuse_unread(prompt_lengths, config)
    if config.schedule == ONCE:
        rows = once.find_rows(prompt_lengths, document_ids, key.shape[0], key.shape[2])
        layer = config.for_layer(layer_idx)
        return once.kept_tokens(key, value, layer, rows, query=query, layer_idx=layer_idx, scale=scale)
    geometry, tokens = config.geometry, key.shape[2]
    lengths = None
    if prompt_lengths is not None:
        lengths = lengths_of_rows(prompt_lengths, key.shape[0], document_ids, key.device)
    if document_ids is not None:
        # A row's length as a tensor of its tokens: what belongs to a document is found by them.
        of_tokens = None if lengths is None else lengths[:, None, None].expand(-1, 1, tokens)

        def of_documents(k: Tensor, v: Tensor, q: Tensor | None, n: Tensor | None) -> Tensor:
            n = None if n is None else n[:, 0, 0]
            return kept_tokens(k, v, config, query=q, prompt_lengths=n, layer_idx=layer_idx, scale=scale)

        kept = per_document(of_documents, document_ids, key, value, query, of_tokens, fill=False)
        return kept | _not_due(document_ids, geometry)[:, None]
    partitions = geometry.compressed(tokens) if config.for_layer(layer_idx) else 0
    if config.mask_form_only and partitions:
        flags = select_freely(
            key, value, config, partitions, query=query, prompt_lengths=lengths, layer_idx=layer_idx, scale=scale
        )
        around = geometry.sink, tokens - geometry.raw_start(partitions)
        return torch.nn.functional.pad(flags.flatten(-2), around, value=True)
    index = select(key, value, config, partitions, query=query, layer_idx=layer_idx, scale=scale)
    return kept_mask(index, tokens, geometry, partitions)


def visibility_mask(
    kept: Tensor,
    config: SparseAttentionConfig,
    *,
    document_ids: Tensor | None = None,
    prompt_lengths: Tensor | int | None = None,
) -> Tensor:
    """The oracle: bool ``[B, H, T, T]``, True where query i sees key j, from ``kept`` bool ``[B, H, T]``."""
    refuse_unread(prompt_lengths, config)
    if config.schedule == ONCE:
        rows = once.find_rows(prompt_lengths, document_ids, kept.shape[0], kept.shape[2])
        return reference.visible_once(kept, once.prompts(rows, kept), document_ids)
    return reference.visible(kept, config.geometry, document_ids)


def slots(config: SparseAttentionConfig | None, tokens: int) -> int:
    """Keys (and values) a head holds after ``tokens`` tokens; ``tokens`` for dense attention (None).

    Under schedule ``prefill_once`` after a prompt of ``tokens`` tokens; each later one adds one.
    """
    if config is None:
        return tokens
    return config.held(tokens) if config.schedule == ONCE else config.geometry.slots(tokens)


def choose_backend(
    backend: str,
    query: Tensor,
    document_ids: Tensor | None = None,
    config: SparseAttentionConfig | None = None,
    heads: int | None = None,
) -> str:
    """``auto`` resolved; an explicit backend that cannot run here or compute ``config`` is an error that says why.

    ``heads``: of keys and values, of whose groups and the config's geometry the fastest depends.

    Raises:
        ValueError: as said.
    """
    _check_backend(backend)
    if config is not None and config.mask_form_only:
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"backend={backend!r} cannot compute this: {config.mask_form_only}; use 'reference' or 'auto'"
            )
        return "reference"
    kernels = {"flex": flex, "flash4": flash4}
    if backend in kernels and (obstacle := kernels[backend].obstacle(query)):
        raise ValueError(f"backend={backend!r} cannot run here: {obstacle}; use 'gather' or 'auto'")
    if backend == "auto":
        backend, reason = _fastest(query, document_ids, None if config is None else config.geometry, heads)
        log.debug("auto picked %s: %s", backend, reason)
    return backend


def _fastest(
    query: Tensor, document_ids: Tensor | None, geometry: Geometry | None, heads: int | None
) -> tuple[str, str]:
    """Which backend is measured to be the fastest (experiments/benchmark), and why."""
    if obstacle := flex.obstacle(query):
        return "gather", obstacle
    if document_ids is not None:
        return "gather", "rows are padded or packed, and a kernel compiled for each document's length costs more"
    batch, query_heads, tokens, dim = query.shape
    if not torch.is_grad_enabled() and tokens < SHORT_PROMPT:
        return "gather", f"a prompt of {tokens} tokens, below {SHORT_PROMPT}, is read before a kernel is compiled"
    work = batch * query_heads * tokens * tokens * dim
    least = FLASH4_FROM
    if work >= least:
        if absent := flash4.obstacle(query):
            return "flex", absent
        ours = geometry is not None and heads is not None and flash4.runs_ours(query, heads, geometry)
        least = FLASH4_FROM if ours else LIBRARYS_FROM
    if work < least:
        return "flex", f"B Hq T T D = {work:.0e}, from {least:.0e} on it is flash4"
    return "flash4", f"B Hq T T D = {work:.0e}, one document a row"


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}")


def _not_due(document_ids: Tensor, geometry: Geometry) -> Tensor:
    """bool ``[B, T]``: tokens behind what their document compresses. A longer document beside it compresses more."""
    result = torch.zeros(document_ids.shape, dtype=torch.bool)
    for document in find_documents(document_ids):
        raw_start = geometry.raw_start(geometry.compressed(document.length))
        result[document.row, document.start + raw_start : document.start + document.length] = True
    return result.to(document_ids.device)


def _check_counts(kept: Tensor, config: SparseAttentionConfig, document_ids: Tensor | None) -> None:
    if document_ids is None:
        check_kept(kept, config)
        return
    for document in find_documents(document_ids):
        span = slice(document.start, document.start + document.length)
        check_kept(kept[document.row : document.row + 1, :, span], config)


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to the inputs of PyTorch's own attention; rotary embeddings left query and key in float32."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    geometry: Geometry,
    scale: float,
    backend: str,
    gate: Tensor | None = None,
) -> Tensor:
    """The parallel form for rows of one document each and a selection ``index [B, H, P * K]``; ``backend`` as chosen.

    With ``reference`` the mask form, by which the others are judged. ``gate [B, H, P * K]``, of the others: a factor of
    the kept values.
    """
    if backend == "reference":
        kept = kept_mask(index, key.shape[2], geometry, geometry.selected_partitions(key.shape[2]))
        return reference.attend(query, key, value, reference.visible(kept, geometry, None), scale)
    run = {"gather": gather, "flex": flex, "flash4": flash4}[backend]
    return run.attend(query, key, value, index, geometry, scale, gate)


def _check(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, document_ids: Tensor | None) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be [B, heads, T, D], not {tuple(query.shape)} and {tuple(key.shape)}")
    batch, heads, tokens, dim = key.shape
    if value.shape != key.shape:
        raise ValueError(f"value {tuple(value.shape)} must have key's shape {tuple(key.shape)}")
    if (query.shape[0], query.shape[2], query.shape[3]) != (batch, tokens, dim):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in all but "
            "heads: attention over a cache (fewer queries than keys) is not the parallel form"
        )
    if len({x.dtype for x in (query, key, value)}) > 1 and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"query, key and value must have one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {heads} key/value heads")
    if kept is not None and (kept.shape != key.shape[:3] or kept.dtype != torch.bool):
        raise ValueError(f"kept must be bool {tuple(key.shape[:3])}, not {kept.dtype} {tuple(kept.shape)}")
    if document_ids is not None and document_ids.shape != (batch, tokens):
        raise ValueError(f"document_ids must be [B, T] = {(batch, tokens)}, not {tuple(document_ids.shape)}")
