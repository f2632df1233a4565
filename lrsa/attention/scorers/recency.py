"""Recency: the newest tokens of a partition; with ``top_k=0`` sinks and a window, StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer


@dataclass(frozen=True)
class Recency(Scorer):
    """The position, counted within the partition: exact in float32 at any length."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    def __call__(self, partitions: Partitions) -> Tensor:
        newer = partitions.positions - partitions.positions[:, :1]
        return newer.float().expand(*partitions.key.shape[:2], -1, -1)
