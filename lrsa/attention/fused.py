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


def interpreted() -> bool:
    """Whether Triton interprets kernels, on any device, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
