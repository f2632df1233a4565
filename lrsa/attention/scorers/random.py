"""Random: the baseline that any rule must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer

_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Random(Scorer):
    """A hash of seed, layer, head and position.

    Not a generator: its state would differ between training, prefill and decode, and under recomputation.
    """

    seed: int = 0

    def __call__(self, partitions: Partitions) -> Tensor:
        batch, heads = partitions.key.shape[:2]
        head = torch.arange(heads, device=partitions.positions.device)[:, None, None]
        state = mix32(torch.full_like(head, self.seed & _LOW32))
        for part in (torch.full_like(head, partitions.layer_idx), head, partitions.positions):
            # 2^32 / golden ratio, less 2^32: compilers hold small positions in int32, which the constant must fit.
            state = mix32(state ^ mix32(part + 0x9E3779B9 - (1 << 32)))
        scores = (state >> 8).float() * 2.0**-24  # [H, P, L], exact in float32
        return scores.expand(batch, *scores.shape)


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64 (C. Wellons, "hash prospector", the function lowbias32)."""
    x = x & _LOW32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW32
    return x ^ (x >> 16)
