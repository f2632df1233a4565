"""One process a GPU, where a launcher starts several processes on one machine."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lrsa.sweep.lock import locked

_HELD = ExitStack()  # the GPU is this process's until it ends


def workers() -> int:
    """`${lrsa.workers:}`: processes that this machine has room for, one a GPU, without a GPU one a core."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def take_one_gpu(locks: Path, launcher: Any) -> None:
    """Under joblib, let this process see one GPU, which no other process of the sweep has on this machine.

    Slurm and Ray hand out GPUs by themselves, and one after another the jobs share a process. To be called before CUDA
    is, which reads CUDA_VISIBLE_DEVICES once.

    Raises:
        RuntimeError: all GPUs are taken; says which setting starts fewer processes.
    """
    if not str(launcher._target_).endswith(".JoblibLauncher"):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if len(names) < 2:
        return
    for name in names:
        lock = locked(locks / f"gpu-{socket.gethostname()}-{name}", patience=0)
        if _HELD.enter_context(lock):
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return
    raise RuntimeError(
        f"all {len(names)} GPUs have a process of this sweep already: set hydra.launcher.n_jobs={len(names)}"
    )
