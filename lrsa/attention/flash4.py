"""The parallel form on flash-attn-4's block-sparse kernels: Hopper and Blackwell, forward and backward.

Keys and block lists are those of `lrsa.attention.blocks`. The first S queries, which see one another alone, are
attended apart, so that the kernels' blocks begin where partitions do without a copy of the queries.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from lrsa.attention import blocks, rows, sinks
from lrsa.attention.blocks import KEY_BLOCK, WALK, Layout, Walk
from lrsa.attention.layout import Geometry
from lrsa.attention.rows import Plan

OLDEST = "4.0.0b36"  # its scalars of a mask came with a beta, and its private functions are called
# Where the kernels were tried. The library takes others too, but at 40 its block-sparse backward pass gave wrong
# gradients of queries (it sizes their sums by 32 channels and seems to walk them by 16); beyond 128 blocks are others.
HEADS = (64, 128)
ARCHITECTURES = (9, 10)  # Hopper, Blackwell


def missing() -> str | None:
    """What of the package is missing, and what to do; None if nothing is."""
    installed = _installed()
    if installed is None:
        return f"flash-attn-4 is not installed: pip install 'flash-attn-4[cu13]>={OLDEST}'"
    if Version(installed) < Version(OLDEST):
        return f"flash-attn-4 is {installed}, and too old: pip install -U 'flash-attn-4[cu13]>={OLDEST}'"
    return None


def obstacle(query: Tensor) -> str | None:
    """Why flash-attn-4 cannot run on this input, or None."""
    if absent := missing():
        return absent
    if query.device.type != "cuda":
        return f"flash-attn-4 runs on CUDA alone, the tensors are on {query.device.type}"
    cast = query.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    if query.dtype not in (torch.bfloat16, torch.float16) and not cast:
        return f"flash-attn-4 computes in bfloat16 or float16, the tensors are {query.dtype}"
    if query.shape[-1] not in HEADS:
        return f"it was tried with head dimensions of {' and '.join(map(str, HEADS))}, this is {query.shape[-1]}"
    major, minor = torch.cuda.get_device_capability(query.device)
    if major not in ARCHITECTURES:
        return f"its block-sparse backward is for compute capability 9 and 10, this GPU has {major}.{minor}"
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and torch.is_grad_enabled():
        return "torch.use_deterministic_algorithms is on, and its backward adds up the queries' gradient in any order"
    return None


@functools.cache  # asked in every layer, and the answer is on the disk
def _installed() -> str | None:
    try:
        return version("flash-attn-4")
    except PackageNotFoundError:
        return None


@torch.compiler.disable  # the kernels bring a compiler of their own
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    geometry: Geometry,
    scale: float,
    gate: Tensor | None = None,
    *,
    walk: Walk = WALK,
) -> Tensor:
    """``query [B, Hq, T, D]``, ``key``/``value`` ``[B, H, T, D]``, ``index [B, H, P * K]`` of at least one partition,
    ``gate`` likewise, a factor of the kept values -> ``[B, Hq, T, D]``. ``walk``: of the backward pass."""
    layout = layout_of(query, key, geometry, walk)
    return Attention.apply(query, key, value, index, gate, layout, scale)


def layout_of(query: Tensor, key: Tensor, geometry: Geometry, walk: Walk = WALK) -> Layout:
    """What the kernels are told for ``query [B, Hq, T, D]`` and ``key [B, H, T, D]``."""
    chip, group = _chip(query.device), query.shape[1] // key.shape[1]
    heads = query.shape[0] * query.shape[1] / chip.processors
    ours = runs_ours(query, key.shape[1], geometry)
    return blocks.layout(geometry, query.shape[2], query.device, walk, heads, chip.query_block, group if ours else None)


def runs_ours(query: Tensor, heads: int, geometry: Geometry) -> bool:
    """Whether it is `lrsa.attention.hopper`'s, for that many key/value heads, where there is no `obstacle`."""
    return _chip(query.device).hopper and suits_hopper(geometry, query.shape[1] // heads, query.shape[3])


def suits_hopper(geometry: Geometry, group: int, dim: int) -> bool:
    """Whether `lrsa.attention.hopper` computes it, not the library's kernels as they come: where it was tried. What a
    block of queries sees raw begins with a block of keys, there is something in the buffer, and heads are in groups,
    but not in large ones: the backward pass reads the buffer once more for each head."""
    aligned = geometry.lag % KEY_BLOCK == 0 and geometry.chunk % KEY_BLOCK == 0
    return 1 < group <= 8 and dim in HEADS and aligned and geometry.sink + geometry.kept > 0


class Chip(NamedTuple):
    """``query_block``: queries a block of the forward kernel."""

    query_block: int
    processors: int
    hopper: bool


@functools.cache  # asked in every layer
def _chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    hopper = properties.major == 9
    return Chip(128 if hopper else 256, properties.multi_processor_count, hopper)


def kernels() -> ModuleType:
    """`lrsa.attention.flash4_kernels`, which can be imported where there is no `obstacle`."""
    return importlib.import_module("lrsa.attention.flash4_kernels")


def hopper_kernels() -> ModuleType:
    """`lrsa.attention.hopper`, likewise."""
    return importlib.import_module("lrsa.attention.hopper")


class Attention(torch.autograd.Function):
    """The backward pass makes the rows of keys anew, and puts their gradients in their place: what they hold is as much
    as keys and values (on Hopper, as the kept ones), and is not kept."""

    @staticmethod
    def forward(ctx, query, key, value, index, gate, layout, scale):
        sink = layout.mask.sink
        plan = plan_of(key, index, layout)
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)  # [B, T, Hq, D], as theirs
        log_sum = _forward(
            query.transpose(1, 2)[:, sink:], key, value, index, gate, plan, out[:, sink:], layout, scale,
            with_log_sum=any(ctx.needs_input_grad),
        )  # fmt: skip
        out = out.transpose(1, 2)
        if sink:
            sinks.attend(query, key, value, out, sink, scale)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, index, gate, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, index, gate, out, log_sum = ctx.saved_tensors
        layout, sink = ctx.layout, ctx.layout.mask.sink
        grad_query = torch.empty_like(out)
        ours = [x.transpose(1, 2)[:, sink:] for x in (query, out, grad_out, grad_query)]
        plan = plan_of(key, index, layout, layout.again)
        grads = None
        if layout.group is not None:
            plan = plan.without_raw()
            grads = rows.empty_gradient(key), rows.empty_gradient(value)
        made = rows.gather(key, value, index, plan, gate)
        buffer = [x.transpose(1, 2) for x in made]
        if grads is not None:
            raw, grad_raw = ([x[:, :, sink:].transpose(1, 2) for x in pair] for pair in ((key, value), grads))
            hopper_kernels().backward(*ours, buffer, raw, grad_raw, log_sum, layout, ctx.scale)
        else:
            kernels().backward(*ours, *buffer, log_sum, layout, ctx.scale)
        grad_key, grad_value, grad_gate = rows.scatter(*made, key, value, index, plan, gate, grads)
        if sink:
            sinks.backward(grad_out, query, key, value, grad_query, grad_key, grad_value, sink, ctx.scale)
        return grad_query, grad_key, grad_value, None, grad_gate, None, None


def _forward(query, key, value, index, gate, plan, out, layout, scale, *, with_log_sum):
    """Of ``query [B, R, Hq, D]`` into ``out``; what Hopper's kernel reads raw is not copied."""
    if layout.group is not None:
        buffer = [x.transpose(1, 2) for x in rows.gather(key, value, index, plan.without_raw(), gate)]
        raw = [x[:, :, plan.raw_start :].transpose(1, 2) for x in (key, value)]
        return hopper_kernels().forward(query, buffer, raw, out, layout, scale, with_log_sum=with_log_sum)
    made = (x.transpose(1, 2) for x in rows.gather(key, value, index, plan, gate))
    return kernels().forward(query, *made, out, layout, scale, with_log_sum=with_log_sum)


def plan_of(key: Tensor, index: Tensor, layout: Layout, again: tuple[int, ...] = ()) -> Plan:
    """Of the rows that a pass reads; ``again``: `Layout.again` for the backward pass."""
    mask = layout.mask
    partitions = index.shape[2] // mask.kept if mask.kept else 0
    return Plan(
        tokens=key.shape[2], sink=mask.sink, lag=mask.lag, kept=mask.kept, partitions=partitions,
        raw_offset=mask.raw_offset, raw_start=mask.sink, length=layout.length, again=again,
    )  # fmt: skip
