"""The ``lrsa`` attention inside of a compiled layer: what is decided in Python is decided while the layer is traced.

Everything here is traced by torch.compile, which bakes in what `_plan` returns and guards what it was asked about: the
layer's config, shapes, and the backend. B batch, Hq query heads, H key/value heads, T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrsa.attention import flex, gather, inspection, operators
from lrsa.attention.api import choose_backend
from lrsa.attention.config import BY_LAYER, SparseAttentionConfig
from lrsa.attention.dense import attend_dense
from lrsa.attention.layout import Geometry

DENSE_LAYER = ""
# Arguments of the bridge; the last three are a model's own, which the bridge refuses.
NEED_PYTHON = "document_ids", "prompt_lengths", "sliding_window", "softcap", "s_aux", "position_bias"


class _Plan(NamedTuple):
    partitions: int  # whose selection some query uses
    backend: str
    reads_query: bool
    sink: int
    lag: int
    kept: int
    chunk: int


def prepare(model: nn.Module, attention: SparseAttentionConfig | None, depth: int) -> None:
    """Tell each attention layer of a live model its own config, as text: layers alike share what is compiled."""
    configs: set[str] = set()
    resolved = None if attention is None else attention.resolved(depth)
    fits = resolved is not None and resolved.schedule == "chunked" and not resolved.mask_form_only
    for module in model.modules():
        if not hasattr(module, "layer_idx"):
            continue
        module.lrsa_layer, module.lrsa_index = None, None  # type: ignore[assignment]
        if fits and resolved is not None and module.layer_idx is not None:
            index: int = module.layer_idx  # type: ignore[assignment]
            layer = resolved.for_layer(index, depth if resolved.budget in BY_LAYER else None)
            module.lrsa_layer = DENSE_LAYER if layer is None else layer.to_json()  # type: ignore[assignment]
            module.lrsa_index = torch.tensor(index, device="cpu")
            configs |= set() if layer is None else {layer.to_json()}
    model.lrsa_layers = tuple(sorted(configs))  # type: ignore[assignment]


def whole_rows(model: nn.Module, tokens: int, device: torch.device) -> dict[str, flex.Layout]:
    """What a model that is compiled layer by layer is passed to say that each row is one document of ``tokens`` tokens:
    by a layer's config, what FlexAttention reads of it, which takes Python and so is not made inside."""
    found: dict[str, flex.Layout] = {}
    if device.type == "cuda" and any(module._compiled_call_impl is not None for module in model.modules()):
        for config in getattr(model, "lrsa_layers", ()):
            geometry = SparseAttentionConfig.from_json(config).geometry
            found[config] = flex.layout_of(geometry, tokens, device)
    return found


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    arguments: Mapping[str, Any],
) -> Tensor | None:
    """The bridge's function: ``query [B, Hq, T, D]``, ``key``/``value [B, H, T, D]`` -> ``[B, Hq, T, D]``, or None for
    what takes Python at every call: rows that may hold several documents, layers that are watched, gradients of scores,
    another schedule, the mask form.

    Raises:
        ValueError: a backend that cannot run here and why.
    """
    layouts, config = arguments.get("whole_rows"), getattr(module, "lrsa_layer", None)
    if (
        layouts is None
        or config is None
        or attention_mask is not None
        or dropout
        or getattr(module, "lrsa_straight_through", False)
        or inspection.active()
        or any(arguments.get(name) is not None for name in NEED_PYTHON)
    ):
        return None
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as the bridge does
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if config == DENSE_LAYER:
        return attend_dense(query, key, value, scale)
    plan = _Plan(
        *_plan(config, tuple(query.shape), key.shape[1], getattr(module, "lrsa_backend", "auto"), device, query.dtype)
    )
    if plan.backend == "reference" or (plan.backend == "gather" and device != "cpu" and torch.is_grad_enabled()):
        return None  # whose gradient on a GPU is autograd's, which operators do not have
    if plan.partitions == 0:
        return attend_dense(query, key, value, scale)
    index = torch.ops.lrsa.select_in_layer(
        key.detach(), value.detach(), query.detach() if plan.reads_query else None, module.lrsa_index, config,
        plan.partitions, scale,
    )  # fmt: skip
    rule = [plan.sink, plan.lag, plan.kept, plan.chunk]
    if plan.backend == "flash4":
        return operators.attend_blocks(query, key, value, index, rule, scale)[0]
    geometry = Geometry(*rule)
    if plan.backend == "flex":
        return flex.attend(query, key, value, index, geometry, scale, layout=layouts[config])
    buffers = gather.buffer(key, index, geometry), gather.buffer(value, index, geometry)
    return operators.attend_spans(query, key, value, *buffers, rule, scale)[0]


@torch.compiler.assume_constant_result
def _plan(
    config: str, shape: tuple[int, ...], heads: int, backend: str, device: str, dtype: torch.dtype
) -> tuple[Any, ...]:
    parsed = SparseAttentionConfig.from_json(config)
    like = torch.empty(1, device=device, dtype=dtype).expand(shape)  # of one element, whatever the batch
    chosen = choose_backend(backend, like, None, parsed, heads)
    geometry = parsed.geometry
    reads_query = parsed.build_scorer().reads_query
    partitions = geometry.selected_partitions(shape[2])
    return partitions, chosen, reads_query, geometry.sink, geometry.lag, geometry.kept, geometry.chunk
