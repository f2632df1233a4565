"""TOVA: keep what the newest query attends to (arXiv 2401.06104), the newest query being the lag's last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer
from lrsa.attention.scorers.observed import attention_received


@dataclass(frozen=True)
class Tova(Scorer):
    """Attention weight from the lag's last query, softmax over the keys of partition and lag, mean over the group.

    Published with the mean over all of a layer's heads, which then keep the same tokens; here each KV head has its own.
    """

    reads_query: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"

    def __call__(self, partitions: Partitions) -> Tensor:
        return attention_received(partitions, 1)
