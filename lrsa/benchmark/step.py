"""A whole training step, dense against sparse: forward, loss on answer tokens, backward, optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lrsa.attention import SparseAttentionConfig, sparse_attention
from lrsa.benchmark.cases import cases
from lrsa.benchmark.kernels import dense_attention, make_inputs, prepared, with_gradients
from lrsa.benchmark.timing import Timing, compare, peak_memory
from lrsa.config import BenchConf
from lrsa.models import build_model, set_attention, target_logits
from lrsa.training.compiling import compiled_layers


def run(conf: BenchConf, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a length and compression: ms a step, tokens/s, peak bytes, and the ratio to the dense step."""
    chosen = cases(conf)
    model = build_model(conf.model, None).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda" or None)
    with compiled_layers(model) if conf.compile else contextlib.nullcontext():
        for length in conf.lengths:
            batch = _batch(conf, length, model.config.vocab_size, device)
            for sparse, compression in chosen:
                steps = {
                    "dense": _step(conf, model, None, optimizer, batch, device),
                    "sparse": _step(conf, model, sparse, optimizer, batch, device),
                }
                times = compare(steps, conf.rounds, device)
                tokens = conf.batch_size * length
                row: dict[str, Any] = {"length": length, "scorer": sparse.scorer, "lag": sparse.lag_size}
                row |= {"compression": compression, "batch_size": conf.batch_size}
                row["step"] = {name: vars(t) for name, t in times.items()}
                row["step_ratio"] = times["sparse"].median / times["dense"].median
                row["tokens_per_second"] = {name: 1e3 * tokens / t.median for name, t in times.items()}
                row["peak_memory"] = {name: peak_memory(step, device) for name, step in steps.items()}
                row |= _attention(conf, model.config, length, sparse, times, device)
                yield row


def _attention(
    conf: BenchConf,
    config: Any,
    length: int,
    sparse: SparseAttentionConfig,
    steps: Mapping[str, Timing],
    device: torch.device,
) -> dict[str, Any]:
    """One layer's attention alone, forward and backward, at the model's shapes: ms, its share of the dense step, and
    the ratio of steps that it predicts were everything else alike."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = replace(conf, query_heads=heads, key_value_heads=config.num_key_value_heads, head_dim=dim)
    inputs = make_inputs(shape, length, device)
    query, key, value = inputs[:3]

    def attend() -> torch.Tensor:
        return sparse_attention(query, key, value, sparse, backend=conf.backends[0])

    functions = {"dense": with_gradients(dense_attention(inputs), inputs), "sparse": with_gradients(attend, inputs)}
    # As CUDA graphs: a step launches ahead of the device, and hides what its launches take.
    times = compare(prepared(functions, device, device.type == "cuda"), conf.rounds, device)
    layers, step = config.num_hidden_layers, steps["dense"].median
    saved = layers * (times["dense"].median - times["sparse"].median)
    return {
        "attention": {name: vars(t) for name, t in times.items()},
        "attention_as_graphs": device.type == "cuda",
        "attention_share": layers * times["dense"].median / step,
        "predicted_step_ratio": (step - saved) / step,
    }


def _batch(conf: BenchConf, length: int, vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, the last 64 of each row as targets: about what eight short answers come to."""
    generator = torch.Generator().manual_seed(conf.run.seed)
    ids = torch.randint(vocabulary, (conf.batch_size, length), generator=generator)
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[:, -min(64, length - 1) :] = True
    return ids.to(device), targets


def _step(
    conf: BenchConf,
    model: torch.nn.Module,
    attention: SparseAttentionConfig | None,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
) -> Callable[[], None]:
    lowered = conf.dtype != "float32"

    def step() -> None:
        set_attention(model, attention, backend=conf.backends[0])
        with torch.autocast(device.type, dtype=getattr(torch, conf.dtype), enabled=lowered):
            logits, targets = target_logits(model, *batch)
            loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
