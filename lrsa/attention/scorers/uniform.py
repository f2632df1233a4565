"""Uniform: every (L/K)-th token, whatever it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class Uniform(Scorer):
    """1 for the last token of each K-th of the partition, 0 for the others."""

    def __call__(self, partitions: Partitions) -> Tensor:
        length, kept = partitions.key.shape[-2], partitions.kept
        scores = torch.zeros(length, device=partitions.key.device)
        if kept:
            scores[(torch.arange(1, kept + 1, device=scores.device) * length) // kept - 1] = 1
        return scores.expand(partitions.key.shape[:-1])
