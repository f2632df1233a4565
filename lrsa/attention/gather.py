"""The parallel form on PyTorch's own attention kernels: CPU and any GPU, memory linear in T, backward included.

Kept keys of all partitions form one buffer ``[sinks | kept]``. Queries are cut into spans with the same compressed
past (`Geometry.spans`); a span of n compressed partitions attends the buffer's first S + nK entries and the raw keys
from S + nL on, two contiguous ranges. Only the last keys, the span's own, need a causal mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lrsa.attention.layout import Geometry, Span

# Queries a call. Longer spans are cut, which saves the masked half of their causal square; shorter ones cost launches.
LONGEST_SPAN = 256


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    geometry: Geometry,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, ``index [B, H, P * K]``, ``gate`` likewise, a factor
    of the kept values -> ``[B, Hq, T, D]``."""
    buffers = buffer(key, index, geometry), buffer(value, index, geometry, gate)
    return SpanAttention.apply(query, key, value, *buffers, geometry, scale)


def buffer(x: Tensor, index: Tensor, geometry: Geometry, gate: Tensor | None = None) -> Tensor:
    """``[sinks | kept]``: ``[B, H, S + P * K, D]``."""
    kept = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
    if gate is not None:
        kept = kept * gate[..., None].to(x.dtype)
    return torch.cat([x[:, :, : geometry.sink], kept], 2)


class SpanAttention(torch.autograd.Function):
    """Span by span. A span's keys are cut again in the backward pass: saving them would take O(T^2) memory."""

    @staticmethod
    def forward(ctx, query, key, value, key_buffer, value_buffer, geometry, scale):
        ctx.geometry, ctx.scale = geometry, scale
        out = torch.empty_like(query)
        bias = _Bias(query, key, _spans(geometry, query.shape[2]))
        sums: list[Tensor] = []  # log-sum-exp of each span's logits, where the kernel hands it out
        for span, kept, raw_start in _spans(geometry, query.shape[2]):
            rows = slice(span.start, span.stop)
            k = _keys(key, key_buffer, kept, raw_start, span)
            v = _keys(value, value_buffer, kept, raw_start, span)
            stacked, log_sum = _forward(_stack(query[:, :, rows], k), k, v, bias(span, k.shape[2]), scale)
            out[:, :, rows] = _unstack(stacked, span)
            sums += [] if log_sum is None else [log_sum]
        log_sum = torch.cat(sums, 2) if sums else query.new_empty(0)
        ctx.save_for_backward(query, key, value, key_buffer, value_buffer, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, key_buffer, value_buffer, out, log_sums = ctx.saved_tensors
        sources = key, value, key_buffer, value_buffer
        bias = _Bias(query, key, _spans(ctx.geometry, query.shape[2]))
        grad_query = torch.empty_like(query)
        # Spans add up in float32: in bfloat16 a key seen by many spans would lose its later contributions.
        grads = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in sources]
        grad_key, grad_value, grad_key_buffer, grad_value_buffer = grads
        groups = query.shape[1] // key.shape[1]
        for span, kept, raw_start in _spans(ctx.geometry, query.shape[2]):
            rows = slice(span.start, span.stop)
            log_sum = log_sums[..., groups * span.start : groups * span.stop] if keeps_log_sum(query) else None
            k = _keys(key, key_buffer, kept, raw_start, span)
            v = _keys(value, value_buffer, kept, raw_start, span)
            grad, q, o = (_stack(x[:, :, rows], k) for x in (grad_out, query, out))
            grad_q, grad_k, grad_v = _backward(grad, q, o, k, v, bias(span, k.shape[2]), log_sum, ctx.scale)
            grad_query[:, :, rows] = _unstack(grad_q, span)
            for buffer, raw, grad in ((grad_key_buffer, grad_key, grad_k), (grad_value_buffer, grad_value, grad_v)):
                buffer[:, :, :kept] += grad[:, :, :kept]
                raw[:, :, raw_start : span.stop] += grad[:, :, kept:]
        return grad_query, *(g.to(x.dtype) for g, x in zip(grads, sources, strict=True)), None, None


def keeps_log_sum(query: Tensor) -> bool:
    """Whether the log-sum-exp of the logits is kept for the backward pass: ``[B, H, G * T]`` float32."""
    return query.device.type == "cpu"


def attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
    geometry: Geometry,
    first: int,
    origin: int,
    scale: float,
) -> Tensor:
    """The same for a block that continues a cache; forward alone.

    Args:
        query: ``[B, Hq, T, D]``, of positions ``first`` to ``first + T``.
        key, value: ``[B, H, R, D]``, raw, of positions ``origin`` to ``first + T``.
        key_buffer, value_buffer: ``[B, H, S + nK, D]``, sinks and kept tokens of all partitions that a query sees so.

    Returns:
        ``[B, Hq, T, D]``.
    """
    out = torch.empty_like(query)
    tokens = first + query.shape[2]
    bias = _Bias(query, key, _spans(geometry, tokens, first))
    for span, kept, raw_start in _spans(geometry, tokens, first):
        rows = slice(span.start - first, span.stop - first)
        raw = slice(raw_start - origin, span.stop - origin)
        k = torch.cat([key_buffer[:, :, :kept], key[:, :, raw]], 2)
        v = torch.cat([value_buffer[:, :, :kept], value[:, :, raw]], 2)
        stacked, _ = _forward(_stack(query[:, :, rows], k), k, v, bias(span, k.shape[2]), scale)
        out[:, :, rows] = _unstack(stacked, span)
    return out


def _spans(geometry: Geometry, tokens: int, start: int = 0) -> Iterator[tuple[Span, int, int]]:
    """Spans with the two ranges they see: buffer entries ``[0, kept)`` and raw keys from ``raw_start``."""
    for span in geometry.spans(tokens, LONGEST_SPAN, start):
        n = span.partitions
        yield span, *((0, 0) if n == 0 else (geometry.buffer_size(n), geometry.raw_start(n)))


def _keys(raw: Tensor, buffer: Tensor, kept: int, raw_start: int, span: Span) -> Tensor:
    """``[B, H, N, D]``: what a span sees, its own keys last."""
    return torch.cat([buffer[:, :, :kept], raw[:, :, raw_start : span.stop]], 2)


def _stack(x: Tensor, key: Tensor) -> Tensor:
    """``[B, Hq, R, D]`` -> ``[B, H, G * R, D]``: heads that share keys as further rows, so that none are copied."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _unstack(x: Tensor, span: Span) -> Tensor:
    return x.unflatten(2, (-1, span.stop - span.start)).flatten(1, 2)


class _Bias:
    """``[G * R, N]`` for a span of R queries and N keys: -inf above the diagonal of the last R keys.

    Made once for each R, as wide as the widest span, and cut from the left: filling one anew for every span would show
    in the time of the forward pass.
    """

    def __init__(self, query: Tensor, key: Tensor, spans: Iterator[tuple[Span, int, int]]) -> None:
        self._like, self._groups = query, query.shape[1] // key.shape[1]
        self._widest = max((kept + span.stop - raw_start for span, kept, raw_start in spans), default=0)
        self._made: dict[int, Tensor] = {}

    def __call__(self, span: Span, keys: int) -> Tensor:
        rows = span.stop - span.start
        if rows not in self._made:
            bias = self._like.new_zeros((rows, self._widest))
            bias[:, self._widest - rows :] = self._like.new_full((rows, rows), -torch.inf).triu_(1)
            self._made[rows] = bias.repeat(self._groups, 1)
        bias = self._made[rows][:, self._widest - keys :]
        return bias if bias.device.type == "cpu" else bias.contiguous()  # CUDA kernels want aligned rows


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    if keeps_log_sum(q):  # the kernel that scaled_dot_product_attention picks here, called by name for its log-sum
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None


def _backward(
    grad: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, bias: Tensor, log_sum: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    if log_sum is not None:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, False, attn_mask=bias, scale=scale
        )
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return torch.autograd.grad(again, (q, k, v), grad)
