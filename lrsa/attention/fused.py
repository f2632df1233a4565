"""Whether this project's Triton kernels run on a tensor. Each has a PyTorch version beside it: the reference."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

LONGEST_PARTITION = 8192  # tokens, of which a program of the selection holds a score each
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runs_on(x: Tensor) -> bool:
    """CUDA, and a dtype that the kernels take. Under the interpreter they run on a CPU too, thousands of times slower:
    for tests, which call them by name."""
    return x.is_cuda and x.dtype in DTYPES and has_triton() and not interpreted()


@functools.cache
def has_triton() -> bool:
    """A CPU build of torch does not bring it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache  # Triton itself asks when it is imported
def interpreted() -> bool:
    """Whether Triton interprets kernels, on any device, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be the tensors'. (Mostly it is, and setting it takes
    as long as a launch.)"""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


def power_of_2(least: int) -> int:
    """The next one. (Triton's own function is one of its language, and takes ten microseconds.)"""
    return 1 << max(0, least - 1).bit_length()
