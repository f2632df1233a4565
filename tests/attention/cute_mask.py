"""The mask in CuTe, compiled for the CPU; imported where flash-attn-4 is installed."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from flash_attn.cute import utils
from torch import Tensor

from lrsa.attention.blocks import Mask
from lrsa.attention.flash4_kernels import mask_arguments


def evaluate(numbers: Mask, rows: int, keys: int) -> Tensor:
    """bool ``[rows, keys]``."""
    arguments = mask_arguments(numbers)
    mask = arguments["mask_mod"]

    @cute.jit
    def fill(out: cute.Tensor, rows: cutlass.Int32, keys: cutlass.Int32, scalars: tuple):
        for row in range(rows):
            for key in range(keys):
                q, k = utils.scalar_to_ssa(row, cutlass.Int32), utils.scalar_to_ssa(key, cutlass.Int32)
                seen = mask(None, None, q, k, None, None, scalars)
                out[row, key] = cutlass.Int32(cutlass.Boolean(utils.ssa_to_scalar(seen)))

    out = torch.zeros(rows, keys, dtype=torch.int32)
    fill(from_dlpack(out), rows, keys, arguments["aux_scalars"])
    return out.bool()
