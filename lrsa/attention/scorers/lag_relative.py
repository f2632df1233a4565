"""LagKV: how far a token stands out, scaled by the range of the tokens that follow it (arXiv 2504.04704)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa.attention import fused
from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class LagRelative(Scorer):
    """Channel-wise deviation of keys, plus ``value_weight`` times that of values. Reads no attention weight."""

    value_weight: float = 1.0
    comparable: ClassVar[bool] = True  # each softmax shares out 1 over the partition
    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.04704"

    def best(
        self, key: Tensor, value: Tensor, length: int, partitions: int, begin: int, count: int, position: int
    ) -> Tensor | None:
        if not (fused.runs_on(key) and fused.runs_on(value)) or length > fused.LONGEST_PARTITION:
            return None
        from lrsa.attention import selection_kernel  # needs triton

        return selection_kernel.lag_best(key, value, length, partitions, begin, count, position, self.value_weight)

    def __call__(self, partitions: Partitions) -> Tensor:
        score = lag_deviation(partitions.key, partitions.lag_key)
        if self.value_weight:
            score = score + self.value_weight * lag_deviation(partitions.value, partitions.lag_value)
        return score


def lag_deviation(x: Tensor, lag: Tensor) -> Tensor:
    """``[..., L, D]`` tokens, ``[..., W, D]`` lag -> ``[..., L]`` float32: softmax over tokens of the deviation over
    channels.

    Channels that are constant in the lag, or so nearly that float32 has no reciprocal of it, have no range to be scaled
    by and count as 0.
    """
    x, lag = x.float(), lag.float()
    low = lag.amin(-2, keepdim=True)
    width = lag.amax(-2, keepdim=True) - low
    ranges = width >= torch.finfo(torch.float32).tiny
    # Divided by 1 there, for a gradient (`straight_through`) would come back as 0 * inf.
    scaled = torch.where(ranges, (x - low) / torch.where(ranges, width, 1.0), 0.0)
    return scaled.std(-1).softmax(-1)
