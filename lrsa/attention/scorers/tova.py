"""TOVA: keep what the newest query attends to (arXiv 2401.06104), the newest query being the lag's last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class Tova(Scorer):
    """Attention weight from the lag's last query, softmax over the keys of partition and lag, mean over the group."""

    reads_query: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"

    def __call__(self, partitions: Partitions) -> Tensor:
        assert partitions.lag_query is not None
        query = partitions.lag_query[..., -1, :].float().movedim(2, 3)  # [B, H, P, G, D]
        keys = torch.cat([partitions.key, partitions.lag_key], -2).float()  # [B, H, P, 2L, D]
        weights = (query @ keys.mT * partitions.scale).softmax(-1).mean(-2)
        return weights[..., : partitions.key.shape[-2]]
