"""Fair timing: interleaved rounds, medians with spread, on CPU and CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds: the median, and the quartiles as spread."""

    median: float
    low: float
    high: float
    rounds: int


def compare(functions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time each function once a round, one after the other, so that a busy moment of the machine hits all alike.

    Every function is called once before, which pays for compilation and allocation.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(_milliseconds(function, device))
    return {name: summary(values) for name, values in samples.items()}


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` as one CUDA graph, after three calls that compile and allocate: a replay launches all its kernels at
    once, however long Python took to."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at the peak of one call beyond what was there before; None on the CPU, which keeps no count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reset_peak(device: torch.device) -> None:
    """Begin to watch for the most bytes allocated, see `peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes allocated since `reset_peak`, what was there before included; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def consecutive(function: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds from the start of each of ``count`` calls to the start of the next; nothing waits in between."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            function()
            times.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def summary(values: list[float]) -> Timing:
    """Of samples in ms."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high, len(values))
