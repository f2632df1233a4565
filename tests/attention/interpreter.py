"""Triton's interpreter, which runs kernels where there is no GPU: by `TRITON_INTERPRET=1 pytest FILE`, or in a process
of a file's own, for Triton decides when it is imported. Without the package triton neither works."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrsa.attention import fused

HAS_TRITON = fused.has_triton()
INTERPRETED = HAS_TRITON and fused.interpreted()
CUDA = HAS_TRITON and torch.cuda.is_available() and not INTERPRETED
on_gpu = pytest.mark.skipif(not CUDA, reason="needs CUDA and triton")


@functools.cache
def problem(small: Callable[[], object]) -> str | None:
    """Why the interpreter cannot be used here, or None. ``small`` calls some kernel."""
    if not HAS_TRITON:
        return "the package triton is not installed (pip install --no-deps triton==3.6.0 into a folder on PYTHONPATH)"
    if not INTERPRETED:
        return "TRITON_INTERPRET=1 is not set; the test `in_a_process_of_its_own` sets it"
    try:
        small()
    except Exception as error:
        if "0-dimensional arrays" in str(error):  # triton 3.6 and numpy 2.4 and later
            return f"this triton's interpreter does not run with this numpy: {error} (numpy 2.3 works)"
        raise
    return None


def skip_without(small: Callable[[], object]) -> None:
    if reason := problem(small):
        pytest.skip(f"the kernel is NOT tested here: {reason}")


def run_in_a_process_of_its_own(file: Path) -> None:
    """The tests of ``file`` that have "interpreted" in their names."""
    if INTERPRETED or CUDA:
        pytest.skip("the kernel runs in this process")
    if not HAS_TRITON:
        pytest.skip("the kernel is NOT tested here: the package triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", "interpreted"],
        cwd=file.parents[2], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    if " passed" not in done.stdout and "NOT tested" in done.stdout:
        pytest.skip(done.stdout[-500:])
    assert done.returncode == 0, done.stdout[-5000:]
