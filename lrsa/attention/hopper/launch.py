"""Kernels as they are compiled and called: the cache, the current device and stream, and what a call hands over."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import cutlass
import torch
from cutlass import Int32, cute
from flash_attn.cute.cache_utils import JITCache, get_jit_cache
from torch import Tensor

from lrsa.attention import blocks, fused
from lrsa.attention.blocks import Lists

DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
OPTIONS = "--enable-tvm-ffi"
NAMES = "forward", "backward"


def cached(name: str, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
    """The compiled kernel of that ``name`` and ``key``, in memory, and on the disk where the library is told so
    (``FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1``)."""
    compiled, key = cache(name), (_sources(), *key)
    if key not in compiled:
        compiled[key] = make()
    return compiled[key]


@functools.cache
def cache(name: str) -> JITCache:
    """Of one of `NAMES`."""
    return get_jit_cache(f"lrsa_{name}")


@functools.cache
def _sources() -> str:
    """A kernel on the disk is of this very code."""
    files = [Path(blocks.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """CuTe launches on the current device, which need not be that of the first argument."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with fused.on(first.device):
            return function(first, *args, **kwargs)

    return run


@functools.lru_cache(maxsize=1024)
def scalars(*numbers: int) -> tuple[Int32, ...]:
    """Boxed once for all calls, which takes a while: outside of what is compiled they hold plain numbers."""
    return tuple(Int32(n) for n in numbers)


def stream() -> Any:
    """PyTorch's current one, when the kernel is called."""
    return cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)


def expanded(lists: Lists, batch: int, heads: int) -> tuple[Tensor, ...]:
    """For each head of each row of the batch, without a copy."""
    return tuple(x.expand(batch, heads, *x.shape[2:]) for x in lists)


def broadcast(*tensors: Tensor) -> tuple[Hashable, ...]:
    """Which tensors have dimensions of stride 0, and which: these are compiled in."""
    strides = enumerate(x.stride() for x in tensors)
    return tuple((i, *(n for n, s in enumerate(stride) if s == 0)) for i, stride in strides if 0 in stride)


def aligned(x: Tensor) -> Tensor:
    """As the tensor copy engine reads: channels side by side, all else at multiples of 16 bytes."""
    size = x.element_size()
    fits = x.stride(-1) == 1 and x.storage_offset() * size % 16 == 0
    fits = fits and all(stride and stride * size % 16 == 0 for stride in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # which moves it even if it is contiguous
