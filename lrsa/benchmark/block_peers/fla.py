"""flash-linear-attention, whose kernels are in the package fla-core: is it here, and can it run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from lrsa.config import BenchConf

OLDEST = "0.6.0"  # its arguments are those that are called here


def installed() -> str | None:
    """The version of fla-core that is here."""
    try:
        return version("fla-core")
    except PackageNotFoundError:
        return None


def obstacle(conf: BenchConf, device: torch.device) -> str | None:
    """What keeps any of its kernels from running, or None."""
    found = installed()
    if found is None or Version(found) < Version(OLDEST):
        state = "is not installed" if found is None else f"is {found}, and too old"
        return f"fla-core (flash-linear-attention's kernels) {state}: pip install 'fla-core[cuda]>={OLDEST}'"
    if device.type != "cuda":
        return f"flash-linear-attention's kernels run on CUDA alone, this is device={device.type}"
    if conf.dtype not in ("bfloat16", "float16"):
        return f"it is timed in bfloat16 or float16, this is dtype={conf.dtype}"
    return None
