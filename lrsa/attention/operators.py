"""What a compiler must not look into, as PyTorch operators: a compiled layer calls them as it does a matrix product.

B batch, Hq query heads, H key/value heads, T tokens, D head dimension; P partitions, K kept of each. ``rule``: the
geometry's S, L, K, C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrsa.attention import flash4, gather
from lrsa.attention.config import SparseAttentionConfig
from lrsa.attention.layout import Geometry

_LIBRARY = torch.library.Library("lrsa", "FRAGMENT")


def _select_in_layer(
    key: Tensor, value: Tensor, query: Tensor | None, layer: Tensor, config: str, partitions: int, scale: float
) -> Tensor:
    with torch.enable_grad():  # off in what is compiled; scores are to be those of the same step uncompiled
        return torch.ops.lrsa.select(key, value, query, config, partitions, 0, 0, int(layer), scale)


def _select_in_layer_shape(
    key: Tensor, value: Tensor, query: Tensor | None, layer: Tensor, config: str, partitions: int, scale: float
) -> Tensor:
    kept = SparseAttentionConfig.from_json(config).geometry.kept
    return key.new_empty((*key.shape[:2], partitions * kept), dtype=torch.int64)


# `selection.select` for ``layer``, the layer's index as a tensor on the CPU: a number would be compiled in, and each
# layer of a model be compiled anew.
_LIBRARY.define(
    "select_in_layer(Tensor key, Tensor value, Tensor? query, Tensor layer, str config, int partitions, float scale) "
    "-> Tensor"
)
_LIBRARY.impl("select_in_layer", _select_in_layer, "CompositeExplicitAutograd")
torch.library.register_fake("lrsa::select_in_layer", _select_in_layer_shape, lib=_LIBRARY)


class _Context:
    """What a `torch.autograd.Function` sees of autograd, where an operator calls its two halves."""

    def __init__(self, *saved: Tensor | None, **values: Any) -> None:
        self.saved_tensors, self.needs_input_grad = saved, (True,)
        self.__dict__.update(values)

    def save_for_backward(self, *saved: Tensor | None) -> None:
        self.saved_tensors = saved


def _operator(
    name: str,
    inputs: tuple[str, ...],
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    shapes: Callable[..., tuple[Tensor, Tensor]],
    gradient_shapes: Callable[..., tuple[Tensor, ...]],
) -> Any:
    """``lrsa::name(*inputs, rule, scale) -> (output, log-sum-exp)`` and the operator that is its gradient.

    Args:
        forward, shapes: called with the inputs, ``rule`` and ``scale``.
        backward, gradient_shapes: with the output's gradient, the inputs, the outputs, ``rule`` and ``scale``; return
            gradients of the first inputs, the others having none.
    """
    arguments = ", ".join(f"Tensor {each}" for each in inputs)
    count = len([each for each in inputs if each != "index"])
    gradients = ", ".join(["Tensor"] * count)
    operators = []
    for each, signature, function, shape in (
        (name, f"({arguments}, int[] rule, float scale) -> (Tensor, Tensor)", forward, shapes),
        (
            f"{name}_backward",
            f"(Tensor grad, {arguments}, Tensor out, Tensor log_sum, int[] rule, float scale) -> ({gradients})",
            backward,
            gradient_shapes,
        ),
    ):
        # Not `torch.library.custom_op`, whose checks are more Python in every call.
        _LIBRARY.define(each + signature)
        _LIBRARY.impl(each, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lrsa::{each}", shape, lib=_LIBRARY)
        operators.append(getattr(torch.ops.lrsa, each).default)
    operator, gradient = operators

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.rule, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = gradient(grad, *ctx.saved_tensors, ctx.rule, ctx.scale)
        return *gradients, *[None] * (len(inputs) - count + 2)

    def once(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"lrsa::{name} can be differentiated once: its gradient has no gradient")

    torch.library.register_autograd(f"lrsa::{name}", differentiate, setup_context=keep, lib=_LIBRARY)
    torch.library.register_autograd(f"lrsa::{name}_backward", once, lib=_LIBRARY)
    return operator


def _spans(*inputs: Any) -> tuple[Tensor, Tensor]:
    query, key, value, key_buffer, value_buffer, rule, scale = inputs
    context = _Context()
    geometry = Geometry(*rule)
    out = gather.SpanAttention.forward(context, query, key, value, key_buffer, value_buffer, geometry, scale)
    return out, context.saved_tensors[-1]  # type: ignore[return-value]


def _spans_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    *tensors, rule, scale = saved
    context = _Context(*tensors, geometry=Geometry(*rule), scale=scale)
    return gather.SpanAttention.backward(context, grad)[:5]


def _spans_shape(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads, rows = key.shape[1], query.shape[1] // key.shape[1] * query.shape[2]
    shape = (query.shape[0], heads, rows) if gather.keeps_log_sum(query) else (0,)
    dtype = torch.promote_types(query.dtype, torch.float32) if gather.keeps_log_sum(query) else query.dtype
    return torch.empty_like(query), query.new_empty(shape, dtype=dtype)


def _spans_backward_shape(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in saved[:5])


def _blocks(*inputs: Any) -> tuple[Tensor, Tensor]:
    query, key, value, index, rule, scale = inputs
    context = _Context()
    layout = flash4.layout_of(query, key, Geometry(*rule))
    out = flash4.Attention.forward(context, query, key, value, index, None, layout, scale)
    return out, context.saved_tensors[-1]  # type: ignore[return-value]


def _blocks_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    query, key, value, index, out, log_sum, rule, scale = saved
    layout = flash4.layout_of(query, key, Geometry(*rule))
    context = _Context(query, key, value, index, None, out, log_sum, layout=layout, scale=scale)
    grad_query, grad_key, grad_value, *_ = flash4.Attention.backward(context, grad)
    return grad_query, grad_key.contiguous(), grad_value.contiguous()


def _blocks_shape(query: Tensor, key: Tensor, value: Tensor, index: Tensor, rule: Any, scale: float) -> Any:
    batch, heads, tokens, dim = query.shape
    out = query.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    return out, query.new_empty((batch, heads, tokens - rule[0]), dtype=torch.float32)


def _blocks_backward_shape(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    _, key, value, _, out, *_ = saved
    return torch.empty_like(out), *(x.new_empty(x.shape) for x in (key, value))


attend_spans = _operator(
    "attend_spans",
    ("query", "key", "value", "key_buffer", "value_buffer"),
    _spans,
    _spans_backward,
    _spans_shape,
    _spans_backward_shape,
)
attend_blocks = _operator(
    "attend_blocks",
    ("query", "key", "value", "index"),
    _blocks,
    _blocks_backward,
    _blocks_shape,
    _blocks_backward_shape,
)
