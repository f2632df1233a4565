"""The mask and the order of columns in CuTe, compiled for the CPU; imported where flash-attn-4 is installed."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from flash_attn.cute import utils
from torch import Tensor

from lrsa.attention.blocks import KEY_BLOCK, Mask
from lrsa.attention.flash4_kernels import mask_arguments
from lrsa.attention.hopper.backward import place
from lrsa.attention.hopper.mask import end_of_columns, first_row


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


def evaluate_on_hopper(numbers: Mask, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """`lrsa.attention.hopper.mask`, bool ``[rows, keys]`` twice: by the end of a row's columns in each block, and by
    the first row of each column."""

    @cute.jit
    def fill(ends: cute.Tensor, firsts: cute.Tensor, rows: cutlass.Int32, keys: cutlass.Int32, scalars: tuple):
        for key in range(keys):
            firsts[key] = first_row(key, scalars, numbers.lag, numbers.chunk)
        for row in range(rows):
            for block in range(keys // KEY_BLOCK):
                ends[row, block] = end_of_columns(row, block * KEY_BLOCK, scalars, numbers.lag, numbers.chunk)

    ends = torch.zeros(rows, keys // KEY_BLOCK, dtype=torch.int32)
    firsts = torch.zeros(keys, dtype=torch.int32)
    fill(from_dlpack(ends), from_dlpack(firsts), rows, keys, mask_arguments(numbers)["aux_scalars"])
    column = torch.arange(keys)
    return column < ends.repeat_interleave(KEY_BLOCK, 1), torch.arange(rows)[:, None] >= firsts


def places(columns: int, groups: int, batch: int, buffered: int, mixed: int) -> Tensor:
    """int32 ``[programs, 3]``: column, group and row of the batch of each program of the backward pass."""

    @cute.jit
    def fill(out: cute.Tensor, programs: cutlass.Int32, numbers: tuple):
        for program in range(programs):
            out[program, 0], out[program, 1], out[program, 2] = place(program, *numbers)

    out = torch.full((columns * groups * batch, 3), -1, dtype=torch.int32)
    fill(from_dlpack(out), len(out), tuple(cutlass.Int32(n) for n in (columns, groups, batch, buffered, mixed)))
    return out
