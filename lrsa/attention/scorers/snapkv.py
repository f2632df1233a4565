"""SnapKV: keep what an observation window attends to, smoothed over neighbours (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from lrsa.attention.scorers.base import Partitions, Scorer
from lrsa.attention.scorers.observed import attention_received


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention weight from the lag's last ``window_size`` queries (all of its where there are fewer), mean over them
    and over the group's query heads, then averaged over ``kernel_size`` neighbours within the partition.

    Published once, at the end of the prompt, with one window for all of it: ``schedule="prefill_once"``. Chunked, each
    partition has its lag's. The softmax is over the keys of partition and lag; with ``sink_size=0`` and
    ``prefill_once`` these are all of the prompt's, as published. What is published pools with zeros beyond the first
    and the last ranked token, which changes the scores of ``kernel_size // 2`` tokens at each end.
    """

    window_size: int = 32
    kernel_size: int = 5
    reads_query: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size={self.window_size}: give a number of queries of at least 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: give an odd number of tokens, 1 for no smoothing")

    def __call__(self, partitions: Partitions) -> Tensor:
        weights = attention_received(partitions, self.window_size)
        # A partition's first and last token have fewer neighbours, not neighbours of weight 0.
        pooled = avg_pool1d(
            weights.flatten(0, 2)[:, None], self.kernel_size, 1, self.kernel_size // 2, count_include_pad=False
        )
        return pooled[:, 0].view_as(weights)
