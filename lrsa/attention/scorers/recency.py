"""Recency: the newest tokens of a partition; with ``top_k=0`` sinks and a window, StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class Recency(Scorer):
    """The position itself."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    def __call__(self, partitions: Partitions) -> Tensor:
        return partitions.positions.float().expand(*partitions.key.shape[:2], -1, -1)
