"""The parallel form on FlexAttention: one fused kernel a pass, CUDA.

Keys are ``[sinks | kept | pad to a block | raw keys]``. A query's compressed past is a prefix of the buffer and its raw
band a range of the rest, so the block mask follows from the geometry, block by block, never from a T x T mask.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lrsa.attention.layout import Geometry

BLOCK = 128


def obstacle(query: Tensor) -> str | None:
    """Why FlexAttention cannot run on this input, or None."""
    if query.device.type != "cuda":
        return f"FlexAttention trains on CUDA alone, the tensors are on {query.device.type}"
    if query.dtype == torch.float64:
        return "FlexAttention has no float64"
    if query.shape[-1] < 16:
        return f"FlexAttention needs a head dimension of at least 16, this is {query.shape[-1]}"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    geometry: Geometry,
    scale: float,
    gate: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, ``index [B, H, P * K]``, ``gate`` likewise, a factor
    of the kept values, in training alone -> ``[B, Hq, T, D]``. Within what is compiled already, ``layout`` is
    `layout_of` this, made outside."""
    tokens = query.shape[2]
    padded = padded_length(tokens)
    if not torch.is_grad_enabled():  # partitions that padded queries alone see: any entry will do
        missing = geometry.selected_partitions(padded) * geometry.kept - index.shape[-1]
        index = torch.nn.functional.pad(index, (0, missing))
    inside = layout is not None
    if layout is None:
        layout = _layout(geometry, padded, geometry.sink + index.shape[-1], query.device)

    # Padded outside of what is compiled, so that lengths of one number of blocks share a kernel.
    query, key, value = (torch.nn.functional.pad(x, (0, 0, 0, padded - tokens)) for x in (query, key, value))
    length = layout.raw_offset + padded
    # Prompts come in groups of any size, training in batches.
    if not inside and not torch.is_grad_enabled() and query.shape[0] > 1:
        for x in (query, key, value, index):
            torch._dynamo.maybe_mark_dynamic(x, 0)
    fused = _fused if inside else _compiled()
    out = fused(query, key, value, index, layout.mask, geometry.sink, layout.raw_offset, length, scale, gate)
    return out[:, :, :tokens]


def padded_length(tokens: int) -> int:
    """Queries that a kernel is compiled for: whole blocks; without gradients in steps of up to an eighth of the length.

    Training sees one length, prompts come in all of them, and a kernel takes ten seconds to compile.
    """
    step = BLOCK
    if not torch.is_grad_enabled():
        step = max(BLOCK, (1 << tokens.bit_length()) // 16)
    return -(-tokens // step) * step


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    mask: BlockMask,
    sink: int,
    raw_offset: int,
    length: int,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """Rows of keys and values, and attention over them: compiled as one graph, for in a model of many small layers the
    time to launch a dozen operators is the time that counts."""
    rows = [_Rows.apply(x, index, sink, raw_offset, length) for x in (key, value)]
    if gate is not None:
        around = sink, length - sink - gate.shape[-1]
        rows[1] = rows[1] * torch.nn.functional.pad(gate, around, value=1.0)[..., None].to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, rows[0], rows[1], block_mask=mask, scale=scale, enable_gqa=grouped)


class _Rows(torch.autograd.Function):
    """``x [B, H, T, D]`` -> ``[sinks | kept | gap | x | tail]`` of ``length`` rows, zeros in gap and tail.

    Autograd's own backward would add up three tensors of full size, one of them by atomics; kept positions are unique.
    """

    @staticmethod
    def forward(ctx, x, index, sink, raw_offset, length):
        batch, heads, tokens, dim = x.shape
        used = sink + index.shape[-1]
        gap = x.new_zeros((batch, heads, raw_offset - used, dim))
        tail = x.new_zeros((batch, heads, length - raw_offset - tokens, dim))
        ctx.save_for_backward(index)
        ctx.sizes = sink, used, raw_offset, tokens
        return torch.cat([x[:, :, :sink], x.gather(2, _expand(index, dim)), gap, x, tail], 2)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        sink, used, raw_offset, tokens = ctx.sizes
        positions = _expand(index, grad.shape[-1])
        total = grad[:, :, raw_offset : raw_offset + tokens].clone()
        total[:, :, :sink] += grad[:, :, :sink]
        total = total.scatter(2, positions, total.gather(2, positions) + grad[:, :, sink:used])
        return total, None, None, None, None


def _expand(index: Tensor, dim: int) -> Tensor:
    return index[..., None].expand(-1, -1, -1, dim)


@functools.cache
def _compiled():
    # Compiled once a shape, and a study has a handful of them: more than PyTorch's limit, past which it goes on
    # uncompiled, with a T x T matrix.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(_fused, dynamic=False)


class Layout:
    """Where the raw keys start (``raw_offset``), and the block mask."""

    def __init__(self, mask: BlockMask, raw_offset: int) -> None:
        self.mask, self.raw_offset = mask, raw_offset


def layout_of(geometry: Geometry, tokens: int, device: torch.device) -> Layout:
    """For rows of ``tokens`` tokens, with or without gradients as they are on now."""
    padded = padded_length(tokens)
    partitions = geometry.selected_partitions(tokens if torch.is_grad_enabled() else padded)
    return _layout(geometry, padded, geometry.buffer_size(partitions), device)


@functools.lru_cache(maxsize=512)  # a pyramid of 36 layers has as many, for each compression
def _layout(geometry: Geometry, tokens: int, used: int, device: torch.device) -> Layout:
    """``tokens`` a multiple of the block; ``used`` entries of the buffer hold a key."""
    raw_offset = -(-used // BLOCK) * BLOCK
    kept_stop = torch.zeros(tokens, dtype=torch.int32)  # a query sees buffer entries [0, kept_stop)
    raw_start = torch.zeros(tokens, dtype=torch.int32)  # and raw keys [raw_start, its own position]
    for start, stop, n in geometry.spans(tokens, tokens):
        if n:
            kept_stop[start:stop], raw_start[start:stop] = geometry.buffer_size(n), geometry.raw_start(n)
    # The padded tail may reach chunks whose partitions were never selected: no real query is there.
    kept_stop.clamp_(max=used)

    per_block = kept_stop.view(-1, BLOCK), raw_start.view(-1, BLOCK)
    least_kept, most_kept = (f(per_block[0], 1)[:, None] for f in (torch.amin, torch.amax))
    first_raw, last_raw = (f(per_block[1], 1)[:, None] for f in (torch.amin, torch.amax))
    first_query = torch.arange(tokens // BLOCK)[:, None] * BLOCK
    first_key = torch.arange((raw_offset + tokens) // BLOCK)[None] * BLOCK
    in_buffer = first_key < raw_offset
    position = first_key - raw_offset  # of a raw block's first key
    raw_full = (position >= last_raw) & (position + BLOCK - 1 <= first_query)
    raw_some = (position + BLOCK > first_raw) & (position <= first_query + BLOCK - 1)
    full = torch.where(in_buffer, first_key + BLOCK <= least_kept, raw_full)
    some = torch.where(in_buffer, first_key < most_kept, raw_some)

    kept_stop, raw_start = kept_stop.to(device), raw_start.to(device)

    def mask_mod(b, h, q, k):
        raw = k - raw_offset
        return torch.where(k < raw_offset, k < kept_stop[q], (raw <= q) & (raw >= raw_start[q]))

    def pack(blocks: Tensor) -> tuple[Tensor, Tensor]:
        count = blocks.sum(-1).to(torch.int32)
        order = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
        return count[None, None].to(device), order[None, None].contiguous().to(device)

    mask = BlockMask.from_kv_blocks(
        *pack(some & ~full), *pack(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, raw_offset + tokens)
    )
    return Layout(mask, raw_offset)
