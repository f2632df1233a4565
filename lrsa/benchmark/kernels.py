"""Sparse against dense attention, forward and forward+backward; a correctness gate stands before each number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lrsa.attention import SparseAttentionConfig, flash4, kept_tokens, rows, sparse_attention
from lrsa.attention.api import choose_backend
from lrsa.attention.blocks import Layout
from lrsa.attention.selection import select
from lrsa.benchmark.cases import cases
from lrsa.benchmark.gate import relative_error, worst
from lrsa.benchmark.timing import Timing, captured, compare, peak_memory
from lrsa.config import BenchConf

# The gate compares at a length where the reference, O(T^2) memory, is cheap; the kernels know no length.
GATE_LENGTH = 1500
PRELIMINARY = 3  # rounds that find the fastest dense kernel


def run(conf: BenchConf, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a scorer, geometry and backend: times in ms, speed-up over dense, the ideal one by attended pairs."""
    chosen = cases(conf)
    for length in conf.lengths:
        inputs = make_inputs(conf, length, device)
        dense = dense_kernels(inputs)
        for config, compression in chosen:
            for backend in conf.backends:
                error, allowed = gate(conf, config, backend, device)
                row: dict[str, Any] = {"length": length, "scorer": config.scorer, "lag": config.lag_size}
                row |= {"compression": compression, "backend": backend}
                row |= {"error": error, "allowed_error": allowed, "gate": "passed" if error <= allowed else "FAILED"}
                if error <= allowed:
                    row |= _timed(conf, config, backend, inputs, dense)
                yield row


def check_backends(conf: BenchConf, device: torch.device) -> None:
    """Before anything is measured.

    Raises:
        ValueError: a backend that is unknown or cannot run here, and why; ``graphs`` without CUDA, or with peers.
    """
    if conf.graphs and device.type != "cuda":
        raise ValueError(f"graphs=true captures CUDA graphs, the device is {device.type}: set graphs=false")
    if conf.graphs and conf.peers:
        raise ValueError(f"graphs=true with peers={conf.peers}: peers are not captured; leave one of them out")
    probe = torch.empty((1, 1, 1, conf.head_dim), dtype=getattr(torch, conf.dtype), device=device)
    for backend in conf.backends:
        choose_backend(backend, probe)


def gate(conf: BenchConf, config: SparseAttentionConfig, backend: str, device: torch.device) -> tuple[float, float]:
    """Largest relative error of output and the three gradients against float64, and what is allowed.

    A fast path may err at most twice as much as the float32 reference does on the same inputs in ``conf.dtype``, the
    selection being the same; a floor of a few roundings keeps tiny numbers from failing it.
    """
    geometry = config.geometry
    # Three partitions are compressed at the end, or as many as the usual length has room for; never none.
    length = min(max(GATE_LENGTH, geometry.first_chunk + geometry.lag + 37), 4 * geometry.lag + geometry.sink + 37)
    inputs = make_inputs(replace(conf, batch_size=1), length, device)
    kept = kept_tokens(inputs[1], inputs[2], config, query=inputs[0])
    exact = _gradients(tuple(x.double() for x in inputs), config, kept, "reference")
    plain = _gradients(inputs, config, kept, "reference")
    fast = _gradients(inputs, config, kept, backend)
    # The reference rounds once, at the end; a kernel in this dtype rounds the attention weights too.
    floor = 4 * torch.finfo(inputs[0].dtype).eps
    return largest_error(fast, exact), max(2 * largest_error(plain, exact), floor)


def _timed(
    conf: BenchConf,
    config: SparseAttentionConfig,
    backend: str,
    inputs: tuple[Tensor, ...],
    dense: Mapping[str, Callable[[], Tensor]],
) -> dict[str, Any]:
    query, key, value = inputs[:3]
    tokens = query.shape[2]

    def sparse() -> Tensor:
        return sparse_attention(query, key, value, config, backend=backend)

    def choose() -> Tensor:
        # With gradients on, as in training, where scoring is compiled.
        return select(key, value, config, config.geometry.selected_partitions(tokens), query=query)

    row = measure(sparse, inputs, dense, inputs, conf.rounds, graphs=conf.graphs)
    with torch.no_grad():
        index = choose()
    parts: dict[str, Callable[[], object]] = {"selection": choose}
    chosen = choose_backend(backend, query, None, config, key.shape[1])
    if chosen == "flash4":  # elsewhere they are not apart from the attention
        layout = flash4.layout_of(query, key, config.geometry)
        parts |= row_passes(key, value, index, layout)
    times = compare(prepared(parts, query.device, conf.graphs), conf.rounds, query.device)
    row |= {name: vars(taken) for name, taken in times.items()}
    return row | against_ideal(config.geometry.pairs(tokens), tokens)


def row_passes(key: Tensor, value: Tensor, index: Tensor, layout: Layout) -> dict[str, Callable[[], object]]:
    """What flash4's passes do besides attending: the rows that the kernels read, and their gradients' way back."""
    forward, backward = (flash4.plan_of(key, index, layout, again) for again in ((), layout.again))
    of_raw = None
    if layout.group is not None:  # Hopper's kernels read raw keys, and write their gradients, where they are
        forward, backward = forward.without_raw(), backward.without_raw()
        of_raw = torch.zeros_like(key), torch.zeros_like(value)

    def gather() -> object:
        with torch.no_grad():
            return rows.gather(key, value, index, forward)

    def scatter() -> object:
        with torch.no_grad():
            made = rows.gather(key, value, index, backward)  # where the kernels put the gradients
            return rows.scatter(*made, key, value, index, backward, of_raw=of_raw)

    return {"rows_forward": gather, "rows_backward": scatter}


def measure(
    sparse: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    dense: Mapping[str, Callable[[], Tensor]],
    dense_inputs: tuple[Tensor, ...],
    rounds: int,
    *,
    graphs: bool = False,
) -> dict[str, Any]:
    """Times of ``sparse`` and of every dense kernel, and peak bytes; the speed-up is over the fastest.

    That one and ``sparse`` take turns, and each runs when the other has just heated the chip, which lowers its clock by
    some percent under such loads: behind three dense kernels ``sparse`` alone would be measured so.

    Args:
        inputs: what ``sparse`` computes from, three leaves, and its output's gradient; the layout is its own.
        dense_inputs: likewise, of the dense kernels.
        graphs: time replays of CUDA graphs.
    """
    device = inputs[0].device
    passes = {name: with_gradients(f, dense_inputs) for name, f in dense.items()}
    passes["sparse"] = with_gradients(sparse, inputs)

    def against_fastest(functions: Mapping[str, Callable[[], object]]) -> tuple[str, dict[str, Timing]]:
        ready = prepared(functions, device, graphs)
        times = compare({name: ready[name] for name in dense}, min(rounds, PRELIMINARY), device)
        best = min(dense, key=lambda n: times[n].median)
        return best, times | compare({name: ready[name] for name in (best, "sparse")}, rounds, device)

    with torch.no_grad():
        forward = against_fastest({**dense, "sparse": sparse})
    both = against_fastest(passes)
    row: dict[str, Any] = {}
    for name, (best, times) in (("forward", forward), ("forward_backward", both)):
        row[name] = {n: vars(t) for n, t in times.items()}
        row[f"{name}_dense"] = best
        row[f"{name}_speedup"] = times[best].median / times["sparse"].median
    row["peak_memory"] = peak_memory(passes["sparse"], device)
    row["peak_memory_dense"] = peak_memory(passes[row["forward_backward_dense"]], device)
    return row


def prepared(
    functions: Mapping[str, Callable[[], object]], device: torch.device, graphs: bool
) -> dict[str, Callable[[], object]]:
    """What is timed: the functions themselves, or their CUDA graphs."""
    return {name: captured(f, device) if graphs else f for name, f in functions.items()}


def against_ideal(pairs: int, tokens: int) -> dict[str, float]:
    """Fields of a row: keys that a query attends on average, and the speed-up that so many would give."""
    return {"keys_per_query": pairs / tokens, "ideal_speedup": tokens * (tokens + 1) / 2 / pairs}


def make_inputs(conf: BenchConf, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient, from a seed."""
    generator = torch.Generator().manual_seed(conf.run.seed)
    heads = (conf.query_heads, conf.key_value_heads, conf.key_value_heads, conf.query_heads)
    shapes = [(conf.batch_size, h, length, conf.head_dim) for h in heads]
    dtype = getattr(torch, conf.dtype)
    made = [torch.randn(s, generator=generator, dtype=torch.float32).to(device, dtype) for s in shapes]
    return (*(x.requires_grad_() for x in made[:3]), made[3])


def dense_kernels(inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """Every dense kernel that runs here; the row names the fastest."""
    if inputs[0].device.type != "cuda":
        return {"sdpa": dense_attention(inputs)}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with_gradients(dense_attention(inputs, backend), inputs)()
            found[name] = dense_attention(inputs, backend)
        except torch.OutOfMemoryError:  # a rival less would flatter the others
            raise
        except RuntimeError:  # not built in, or not for this shape and dtype
            continue
    if flash4.obstacle(inputs[0]) is None:
        found["flash4"] = lambda: flash4.kernels().attend_causally(*inputs[:3])
    return found or {"sdpa": dense_attention(inputs)}


def dense_attention(inputs: tuple[Tensor, ...], backend: SDPBackend | None = None) -> Callable[[], Tensor]:
    """Causal attention by that kernel of PyTorch; None: by the one it chooses."""
    query, key, value = inputs[:3]

    def attend() -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        if backend is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return attend


def with_gradients(function: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward: ``inputs`` are three leaves and the output's gradient."""
    return lambda: torch.autograd.grad(function(), inputs[:3], inputs[3])


def _gradients(
    inputs: tuple[Tensor, ...], config: SparseAttentionConfig, kept: Tensor, backend: str
) -> tuple[Tensor, ...]:
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    out = sparse_attention(query, key, value, config, kept=kept, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])


def largest_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest of the relative errors, each in the Euclidean norm; infinite where one is no number."""
    return worst([relative_error(f, e) for f, e in zip(found, exact, strict=True)])
