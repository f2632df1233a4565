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

    def fused(self, key: Tensor, value: Tensor) -> bool:
        differentiable = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        return fused.runs_on(key) and fused.runs_on(value) and not differentiable

    def __call__(self, partitions: Partitions) -> Tensor:
        length = partitions.key.shape[-2]
        # Chunked, a lag is as long as its partition; a prompt that is compressed once is ranked once.
        chunked = partitions.lag_key.shape[-2] == length <= fused.LONGEST_PARTITION
        if chunked and self.fused(partitions.key, partitions.value):
            from lrsa.attention import selection_kernel  # needs triton

            tensors = partitions.key, partitions.lag_key, partitions.value, partitions.lag_value
            return selection_kernel.lag_scores(*tensors, self.value_weight)
        score = lag_deviation(partitions.key, partitions.lag_key)
        if self.value_weight:
            score = score + self.value_weight * lag_deviation(partitions.value, partitions.lag_value)
        return score


def lag_deviation(x: Tensor, lag: Tensor) -> Tensor:
    """``[..., L, D]`` tokens, ``[..., W, D]`` lag -> ``[..., L]`` float32: softmax over tokens of the deviation over
    channels.

    Channels that are constant in the lag have no range to be scaled by and count as 0.
    """
    x, lag = x.float(), lag.float()
    low, high = lag.amin(-2, keepdim=True), lag.amax(-2, keepdim=True)
    # Divided by 1 there, for a gradient (`straight_through`) would come back as 0 * inf.
    scaled = torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1.0), 0.0)
    return scaled.std(-1).softmax(-1)
