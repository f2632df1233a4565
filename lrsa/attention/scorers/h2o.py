"""H2O: keep the heavy hitters, the tokens that got the most attention so far (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrsa.attention.scorers.base import Partitions, Scorer
from lrsa.attention.scorers.observed import attention_received


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention weight accumulated over all the lag's queries, mean over the group's query heads.

    Published with the queries since a token was read, which favours old tokens; here every token of a partition is
    judged by the same queries.
    """

    reads_query: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"

    def __call__(self, partitions: Partitions) -> Tensor:
        return attention_received(partitions, partitions.lag_key.shape[-2])
