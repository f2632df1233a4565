"""`lrsa.attention.sinks` in two Triton kernels, one each way. Imported there, for it needs the package triton.

Inputs of 16 bits are multiplied as tf32, which holds them exactly and weights as well as float16 does; float32 ones are
not rounded.
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from lrsa.attention import fused


@triton.jit
def _read(ptr, batch, head, of_batch, of_head, of_token, token, dim, real):  # type: ignore[no-untyped-def]
    at = ptr + batch * of_batch + head * of_head + token[:, None] * of_token + dim[None, :]
    return tl.load(at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _weights(query, key, token, sink, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """A causal softmax; rows that are not there see all sinks, with a query and a gradient of zeros."""
    seen = (token[None, :] <= token[:, None]) & (token[None, :] < sink)
    logits = tl.where(seen, tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query_ptr,  # [B, Hq, T, D]
    key_ptr,  # [B, H, T, D]
    value_ptr,
    out_ptr,  # [B, Hq, T, D]
    scale,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    out_batch,
    out_head,
    out_token,
    SINK: tl.constexpr,
    HEADS: tl.constexpr,  # query heads
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of B * Hq
    batch, head = program // HEADS, program % HEADS
    token, dim = tl.arange(0, TILE), tl.arange(0, DIM_TILE)
    real = (token < SINK)[:, None] & (dim < DIM)[None, :]
    query = _read(query_ptr, batch, head, query_batch, query_head, query_token, token, dim, real)
    key = _read(key_ptr, batch, head // GROUP, key_batch, key_head, key_token, token, dim, real)
    value = _read(value_ptr, batch, head // GROUP, value_batch, value_head, value_token, token, dim, real)
    out = tl.dot(_weights(query, key, token, SINK, scale, PRECISION), value, input_precision=PRECISION)
    to = out_ptr + batch * out_batch + head * out_head + token[:, None] * out_token + dim[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr,  # of the output
    query_ptr,
    key_ptr,
    value_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    scale,
    grad_batch,
    grad_head,
    grad_token,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    grad_query_batch,
    grad_query_head,
    grad_query_token,
    grad_key_batch,
    grad_key_head,
    grad_key_token,
    grad_value_batch,
    grad_value_head,
    grad_value_token,
    SINK: tl.constexpr,
    HEADS: tl.constexpr,  # of keys
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # of B * H: all heads of a group, whose gradients of keys add up
    batch, head = program // HEADS, program % HEADS
    token, dim = tl.arange(0, TILE), tl.arange(0, DIM_TILE)
    real = (token < SINK)[:, None] & (dim < DIM)[None, :]
    key = _read(key_ptr, batch, head, key_batch, key_head, key_token, token, dim, real)
    value = _read(value_ptr, batch, head, value_batch, value_head, value_token, token, dim, real)
    of_key = _read(grad_key_ptr, batch, head, grad_key_batch, grad_key_head, grad_key_token, token, dim, real)
    of_value = _read(grad_value_ptr, batch, head, grad_value_batch, grad_value_head, grad_value_token, token, dim, real)
    for member in range(GROUP):
        mine = head * GROUP + member
        query = _read(query_ptr, batch, mine, query_batch, query_head, query_token, token, dim, real)
        grad = _read(grad_ptr, batch, mine, grad_batch, grad_head, grad_token, token, dim, real)
        weights = _weights(query, key, token, SINK, scale, PRECISION)
        of_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        of_logits = weights * (of_weights - tl.sum(weights * of_weights, 1)[:, None]) * scale
        of_key += tl.dot(tl.trans(of_logits), query, input_precision=PRECISION)
        of_value += tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
        at = batch * grad_query_batch + mine * grad_query_head + token[:, None] * grad_query_token + dim[None, :]
        tl.store(
            grad_query_ptr + at,
            tl.dot(of_logits, key, input_precision=PRECISION).to(grad_query_ptr.dtype.element_ty),
            mask=real,
        )
    at = batch * grad_key_batch + head * grad_key_head + token[:, None] * grad_key_token + dim[None, :]
    tl.store(grad_key_ptr + at, of_key.to(grad_key_ptr.dtype.element_ty), mask=real)
    at = batch * grad_value_batch + head * grad_value_head + token[:, None] * grad_value_token + dim[None, :]
    tl.store(grad_value_ptr + at, of_value.to(grad_value_ptr.dtype.element_ty), mask=real)


def attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, sink: int, scale: float) -> None:
    """See `sinks.attend`."""
    tensors = [*_readable(query, key, value), out]
    with fused.on(query.device):
        _attend[(query.shape[0] * query.shape[1],)](
            *tensors, scale, *_strides(tensors), **_shape(query, key, query, sink)
        )


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    sink: int,
    scale: float,
) -> None:
    """See `sinks.backward`."""
    tensors = [*_readable(grad, query, key, value), grad_query, grad_key, grad_value]
    with fused.on(query.device):
        _backward[(key.shape[0] * key.shape[1],)](*tensors, scale, *_strides(tensors), **_shape(query, key, key, sink))


def _readable(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(tensors: list[Tensor]) -> list[int]:
    assert all(x.stride(-1) == 1 for x in tensors)
    return [stride for x in tensors for stride in x.stride()[:3]]


def _shape(query: Tensor, key: Tensor, heads: Tensor, sink: int) -> dict[str, int | str]:
    dim = query.shape[3]
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    return {
        "SINK": sink, "HEADS": heads.shape[1], "GROUP": query.shape[1] // key.shape[1], "DIM": dim,
        "TILE": max(16, fused.power_of_2(sink)), "DIM_TILE": max(16, fused.power_of_2(dim)),
        "PRECISION": precision, "num_warps": 4,
    }  # fmt: skip
