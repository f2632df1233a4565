"""Rivals that generate in their own way, measured as they come: no gate, for they compute another function.

kvpress compresses once, at the end of a prefill under a forward hook, and decodes over transformers' `DynamicCache`,
whose keys are concatenated anew in every step: no CUDA graph can hold it. It needs transformers < 5.3, hence a process
in an environment of its own: `pip install 'lrsa[peers]'` there, then
`lrsa-bench mode=generate engines=[dense,kvpress/LagKVPress]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lrsa.benchmark.engines import bytes_per_slot, weight_bytes
from lrsa.benchmark.filled import ENOUGH_SECONDS, free_memory
from lrsa.benchmark.timing import consecutive, peak, reset_peak, summary
from lrsa.config import BenchConf
from lrsa.evaluation.peers import build_press, press_fields
from lrsa.models import set_attention

WARM_UP = 3  # steps that are not timed


def measure(
    engine: str, compression: float, model: PreTrainedModel, ids: Tensor, conf: BenchConf, device: torch.device
) -> dict[str, Any]:
    """Prefill of ``ids [1, T]`` under the press, then greedy steps; fields as the other engines' rows have them.

    Args:
        compression: nominal; kvpress counts what it removes, so its ratio is 1 - 1 / compression.
    """
    set_attention(model, None)
    press = press_of(engine, compression, conf.sink_size, max(conf.lags))
    cache: Any = None
    times: list[float] = []
    logits: Tensor | None = None
    while len(times) <= conf.rounds and sum(times[1:]) < 1e3 * ENOUGH_SECONDS:
        cache = logits = None
        free_memory(device)
        reset_peak(device)
        cache = DynamicCache(config=model.config)
        begin = time.perf_counter()
        with torch.no_grad(), press(model):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    assert logits is not None
    timing, prefill_peak = summary(times[1:]), peak(device)  # the first one warms up
    reset_peak(device)
    step = _step(model, cache, logits.argmax(-1), ids.shape[1])
    consecutive(step, WARM_UP, device)
    slots = cache.layers[0].keys.shape[2]
    steps = consecutive(step, conf.decode_steps, device)
    mean = sum(steps) / len(steps)
    tokens = ids.shape[1] + WARM_UP + conf.decode_steps
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    return {
        "batch": 1,
        "gate": "none",
        "prefill": {
            "ms": vars(timing),
            "tokens_per_second": 1e3 * ids.shape[1] / timing.median,
            "peak_memory": prefill_peak,
        },
        "decode": {
            "ms": vars(summary(steps)),
            "mean_ms": mean,
            "worst_ms": max(steps),
            "steps": len(steps),
            "graphed": False,
            "tokens_per_second": 1e3 / mean,
            "peak_memory": peak(device),
        },
        "cache": {
            "slots": cache.layers[0].keys.shape[2],
            "ratio": tokens / cache.layers[0].keys.shape[2],
            "bytes": held,
            "buffer_bytes": 0,
            "dense_bytes": tokens * bytes_per_slot(model),
            "tokens": tokens,
        },
        "bytes_per_step": {
            "weights": weight_bytes(model),
            "cache": round((slots + conf.decode_steps / 2) * bytes_per_slot(model)),
        },
    }


def press_of(engine: str, compression: float, sink_size: int, lag_size: int) -> Any:
    """The press, with our sinks and lag where it has such settings."""
    ours = {"n_sink": sink_size, "lag_size": lag_size}
    return build_press(engine, compression, {name: ours[name] for name in ours if name in press_fields(engine)})


def _step(model: PreTrainedModel, cache: Any, first: Tensor, position: int) -> Callable[[], None]:
    """A greedy step; the position goes on from the prompt's length, whatever the cache holds."""
    tokens, positions = first[:, None].clone(), torch.full_like(first, position)[:, None]

    @torch.no_grad()
    def step() -> None:
        out = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.copy_(out.logits[:, -1].argmax(-1)[:, None])
        positions.add_(1)

    return step
